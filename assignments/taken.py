"""What is graded of a student's files, and what such code may do.

Of each file of the core only these are taken, and put into the core as it was handed out:

* the bodies of the assigned functions;
* functions that are new, at the top level, and there too what is imported or named, as EPS = 1e-6.

All else of a student's file is never run. A function that may not be taken has a body that raises
in its place: it costs the checks that need it, and they say why.

What such a function may do is a list (``fault``): the modules of MODULES, the builtins of BUILTINS,
attributes that lead neither to the interpreter nor to files. Python is large, and this is no proof
that nobody finds a way around it; see README.md.
"""
import ast
import builtins
import collections
import functools
import itertools
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

CORE = ("model", "dp_skip", "speculative")             # in the order in which they import
LARGEST_FILE = 1 << 20                                 # bytes
UNWRITTEN = re.compile(r"[\w.]+, problem \d")          # what the body of an assigned function says

MODULES = {
    "collections", "collections.abc", "functools", "itertools", "math", "time",
    "torch", "torch.nn", "torch.nn.functional", *CORE,
}
BUILTINS = set("""
    abs all any bool bytes callable complex dict divmod enumerate filter float frozenset hash id int
    isinstance issubclass iter len list map max min next object pow print range repr reversed round
    set slice sorted str sum super tuple zip NotImplemented Ellipsis ArithmeticError AssertionError
    AttributeError FloatingPointError IndexError KeyError LookupError NotImplementedError
    OverflowError RuntimeError StopIteration TypeError ValueError ZeroDivisionError
""".split())
HARMLESS = {                                           # attributes, although modules are named so
    "attention", "chunk", "collections", "copy", "cpu", "distributions", "functional", "functools",
    "itertools", "linalg", "math", "nn", "queue", "random", "select", "special", "time", "token",
    "torch", "trace",
}
INSIDE = {                                             # modules, as attributes of torch's
    name
    for module in (torch, torch.nn, torch.nn.functional)
    for name in dir(module)
    if isinstance(getattr(module, name), ModuleType)
}
OF_TORCH = set("""
    BFloat16Tensor BoolTensor ByteTensor CharTensor DoubleTensor FloatTensor Generator HalfTensor
    IntTensor LongTensor ModuleDict ParameterDict ShortTensor Size Tensor autocast broadcast_shapes
    device dtype enable_grad finfo get_default_device get_default_dtype iinfo inference_mode
    initial_seed is_grad_enabled is_inference_mode_enabled is_tensor layout manual_seed
    memory_format no_grad seed set_grad_enabled unravel_index vmap
""".split())
# What else torch has that is no operation on tensors: TorchScript, files, settings.
MACHINERY = {
    name for name in dir(torch)
    if callable(getattr(torch, name))
    and not hasattr(torch.Tensor, name)
    and not hasattr(torch._C._VariableFunctions, name)
} - OF_TORCH
REFUSED = (set(sys.stdlib_module_names) | INSIDE) - HARMLESS | MACHINERY | set("""
    ABC ABCMeta Enum EnumMeta EnumType UserDict UserList UserString apply_ cached_property compile
    data_ptr format format_map from_buffer from_file frombuffer get_device_module import_ir_module
    load map2_ map_ mp mro numpy partialmethod save set_ share_memory_ singledispatch
    singledispatchmethod storage tofile total_ordering typename untyped_storage update_wrapper wraps
""".split())
HIDDEN = re.compile(r"_\w+|(f|tb|gi|cr|ag|co|func|register|set_default|sparse)_\w+")
OF_TUPLES = {"_replace", "_asdict"}                    # of a NamedTuple, and not hidden
NOT_TO_BE_SET = set().union(*map(dir, (
    collections, functools, itertools, math, time, torch, torch.nn, torch.nn.functional,
    torch.Tensor, torch.nn.Module, torch.Generator, collections.Counter, dict, list, set, str,
)))

STATEMENTS = {
    ast.ClassDef: "a class",
    ast.AsyncFunctionDef: "async",
    ast.AsyncFor: "async",
    ast.AsyncWith: "async",
    ast.Await: "await",
    ast.Global: "global",
    ast.MatchClass: "a class pattern",
}


class Names(NamedTuple):
    """Attributes of the core: an assignment to them could exchange what the checks use, or not."""
    fixed: set[str]           # functions, methods and what modules bind
    fields: set[str]          # of objects


class Taken(NamedTuple):
    """A module of the core with a student's functions in it."""
    tree: ast.Module
    notes: list[str]          # what was not taken, and why


# ---------------------------------------------------------------------------- what code may do

def refusal(tree: ast.AST, names: Names) -> str:
    """The first thing in this code that is not allowed, with its line; "" if there is none."""
    for node in walk(tree):
        what = fault(node, names)
        if what:
            return f"line {getattr(node, 'lineno', '?')} uses {what}, which is not allowed"
    return ""


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes; but of type(x).__name__, which messages use, only x: type makes classes too."""
    nodes = [tree]
    while nodes:
        node = nodes.pop(0)
        match node:
            case ast.Attribute(ast.Call(ast.Name("type"), [ast.Name() as of], []), "__name__"):
                nodes.append(of)
            case _:
                yield node
                nodes += ast.iter_child_nodes(node)


def fault(node: ast.AST, names: Names) -> str:
    """What is not allowed in a node itself."""
    if type(node) in STATEMENTS:
        return STATEMENTS[type(node)]
    if isinstance(node, ast.Name) and not is_name_allowed(node):
        return f"the name {node.id}"
    if isinstance(node, ast.FunctionDef) and node.name.startswith("__"):
        return f"the name {node.name}"
    if isinstance(node, ast.Attribute):
        if not is_attribute_allowed(node.attr):
            return f".{node.attr}"
        if not isinstance(node.ctx, ast.Load) and not may_be_set(node, names):
            return f"an assignment to .{node.attr}"
    if isinstance(node, ast.Import | ast.ImportFrom):
        return import_fault(node)
    if getattr(node, "finalbody", []):
        return "finally"                               # it may hold up what a check raises
    if isinstance(node, ast.ExceptHandler) and not is_handler_allowed(node):
        return "an except without the name of one error"
    return ""


def is_name_allowed(node: ast.Name) -> bool:
    is_read = isinstance(node.ctx, ast.Load)
    is_builtin = node.id in dir(builtins)
    return not node.id.startswith("__") and not (is_read and is_builtin and node.id not in BUILTINS)


def is_attribute_allowed(name: str) -> bool:
    is_hidden = HIDDEN.fullmatch(name) and name not in OF_TUPLES
    return not is_hidden and name not in REFUSED


def may_be_set(node: ast.Attribute, names: Names) -> bool:
    """A field of the core's objects, or a new one of self."""
    is_of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
    is_fixed = node.attr in NOT_TO_BE_SET | names.fixed
    return not is_fixed and (is_of_self or node.attr in names.fields)


def import_fault(node: ast.Import | ast.ImportFrom) -> str:
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    else:
        modules = ["." * node.level + (node.module or "")]
        for name in [alias.name for alias in node.names]:
            if f"{node.module}.{name}" not in MODULES and not is_attribute_allowed(name):
                return f"{node.module}.{name}"
    for name in modules:
        if name not in MODULES:
            return f"the module {name}"
    return "import *" if node.names[0].name == "*" else ""


def is_handler_allowed(node: ast.ExceptHandler) -> bool:
    """Exception and BaseException are no names of BUILTINS: what a check raises is not caught."""
    kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    return all(isinstance(kind, ast.Name) and kind.id in BUILTINS for kind in kinds)


# ---------------------------------------------------------------------------- what is taken

def assemble(skeleton: str, file: Path, names: Names) -> Taken:
    """A module as handed out, with the functions of this file. Its lines are the file's.

    Never raises, whatever stands in the file.
    """
    core = ast.parse(skeleton)
    student, trouble = parsed(file)
    notes = [trouble] if trouble else []
    notes += ignored(core, student, file.name)
    for name, node in functions(core):
        written = find(student, name)
        if not is_unwritten(node):
            ast.increment_lineno(node, written.lineno - node.lineno if written else 0)
            continue
        reason = trouble or take(node, written, names)
        if reason:
            node.body = raising(reason)
        if reason and not trouble:
            notes.append(f"{file.name}: {name}: {reason}")
        node.decorator_list.append(ast.Name("__watched__", ast.Load()))
    core.body += news(student, bound(core), names, notes, file.name)
    return Taken(ast.fix_missing_locations(core), notes)


def ignored(core: ast.Module, student: ast.Module, file: str) -> list[str]:
    """What a student wrote in vain."""
    handed_out = dict(functions(core))
    notes = []
    for name, written in functions(student):
        node = handed_out.get(name)
        if node is None and "." in name and name.split(".")[0] in bound(core):
            notes.append(f"{file}: {name} is new: new functions are taken outside of classes only")
        elif node and not is_unwritten(node) and ast.dump(written) != ast.dump(node):
            notes.append(f"{file}: {name} is not assigned: the one handed out is used")
    return notes


def parsed(file: Path) -> tuple[ast.Module, str]:
    """What stands in a file, and why nothing does. A link could lead to the reference."""
    try:
        if file.is_symlink() or file.stat().st_size > LARGEST_FILE:
            return ast.Module([], []), f"{file.name} is a link, or too large"
        if not file.is_file():                         # reading a pipe would wait for ever
            return ast.Module([], []), f"{file.name} is not a file"
        tree = ast.fix_missing_locations(ast.parse(file.read_bytes()))
        ast.dump(tree)                                 # not too deep?
        return tree, ""
    except OSError:
        trouble = f"there is no {file.name}"
    except SyntaxError as error:
        trouble = f"{file.name} does not load, SyntaxError in line {error.lineno}: {error.msg}"
    except (ValueError, RecursionError, MemoryError) as error:
        trouble = f"{file.name} does not load, {type(error).__name__}: {error}"
    return ast.Module([], []), trouble


def functions(core: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    """Functions and methods of a module: dotted name in it, and definition."""
    found = []
    for node in core.body:
        inside = node.body if isinstance(node, ast.ClassDef) else []
        found += [(f"{node.name}.{part.name}", part) for part in inside if is_function(part)]
        if is_function(node):
            found.append((node.name, node))
    return found


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef)


def is_unwritten(node: ast.FunctionDef) -> bool:
    """Does it just say so? (The line may be left behind a body that returns before it.)"""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not (len(body) == 1 and isinstance(body[0], ast.Raise)):
        return False
    error = body[0].exc
    return isinstance(error, ast.Call) and bool(error.args) and bool(
        UNWRITTEN.fullmatch(str(getattr(error.args[0], "value", ""))))


def find(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """A function by its dotted name: the last definition, as in Python."""
    node = tree
    for part in name.split("."):
        kinds = ast.FunctionDef | ast.ClassDef
        found = [n for n in getattr(node, "body", []) if isinstance(n, kinds) and n.name == part]
        node = found[-1] if found else None
    return node if is_function(node) else None


def take(node: ast.FunctionDef, written: ast.FunctionDef | None, names: Names) -> str:
    """Give an assigned function the body that was written; or say why not."""
    if written is None:
        return "this function is not in the file"
    if arguments(written) != arguments(node):
        return f"its arguments are no longer {', '.join(arguments(node))}"
    if is_unwritten(written):
        return ""
    reason = refusal(ast.Module(written.body, []), names)
    if not reason:
        node.body = [without_annotations(statement) for statement in written.body]
        node.lineno, node.end_lineno = written.lineno, written.end_lineno
    return reason


def arguments(node: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)]


def raising(reason: str) -> list[ast.stmt]:
    """A body that says why there is no other."""
    return ast.parse(f"raise NotImplementedError({'not taken: ' + reason!r})").body


def news(
    student: ast.Module, known: set[str], names: Names, notes: list[str], file: str
) -> list[ast.stmt]:
    """Functions, imports and named values at the top level that the core has not."""
    taken = []
    for node in student.body:
        new = bound(ast.Module([node], [])) - known
        if not new:
            continue
        reason = refusal(node, names)
        if not isinstance(node, ast.FunctionDef | ast.Import | ast.ImportFrom):
            reason = reason or value_fault(node)
        if new & set(dir(builtins)):
            reason = f"line {node.lineno} takes a builtin's name"
        if is_function(node) and not reason:
            reason = definition_fault(node, known | bound(ast.Module(taken, [])))
        if reason:
            notes.append(f"{file}: {', '.join(sorted(new))}: {reason}")
        if reason and is_function(node):
            taken += ast.parse(f"def {node.name}(*_, **__): 0").body
            taken[-1].body = raising(reason)
        elif not reason:
            taken.append(without_annotations(node))
    return taken


def definition_fault(node: ast.FunctionDef, known: set[str]) -> str:
    """What is named by defaults and decorators, which are needed at once, and is not taken."""
    for part in [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]:
        inside = list(ast.walk(part))
        names = [n for n in inside if isinstance(n, ast.Name)]
        its_own = {n.arg for n in inside if isinstance(n, ast.arg)}
        its_own |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
        for name in names:
            if name.id not in known | its_own | BUILTINS:
                return f"line {name.lineno} names {name.id}, which is not taken"
    return ""


def without_annotations(statement: ast.stmt) -> ast.stmt:
    """Python would look them up, and what they name may not be taken."""
    for node in ast.walk(statement):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif is_function(node):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return statement


def value_fault(node: ast.stmt) -> str:
    try:
        ast.literal_eval(node.value)
    except (ValueError, TypeError, AttributeError, SyntaxError, MemoryError, RecursionError):
        return f"line {node.lineno} is no value written out, such as EPS = 1e-6"
    return ""


def bound(tree: ast.Module) -> set[str]:
    """Names that a module binds at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        else:
            inside = ast.walk(node)
            found = [n for n in inside if isinstance(n, ast.Name)]
            names |= {n.id for n in found if isinstance(n.ctx, ast.Store)}
    return names


def names_of(skeletons: dict[str, str]) -> Names:
    """What the core's modules and classes bind, and what is set of its objects."""
    fixed = set()
    fields = set()
    for tree in map(ast.parse, skeletons.values()):
        fixed |= bound(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                fields.add(node.attr)
            if isinstance(node, ast.ClassDef):
                fields |= {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
                fixed |= {part.name for part in node.body if is_function(part)}
    return Names(fixed, fields)


# ---------------------------------------------------------------------------- loading it

def assemble_all(skeletons: dict[str, str], repo: Path) -> dict[str, Taken]:
    names = names_of(skeletons)
    return {name: assemble(skeletons[name], repo / f"{name}.py", names) for name in CORE}


def install(taken: dict[str, Taken], repo: Path, watched):
    """Make these the modules of the core. watched: a decorator of the assigned functions."""
    for name, (tree, _) in taken.items():
        module = ModuleType(name)
        module.__file__ = str(repo / f"{name}.py")
        module.__watched__ = watched
        sys.modules[name] = module
        exec(compile(tree, module.__file__, "exec"), module.__dict__)

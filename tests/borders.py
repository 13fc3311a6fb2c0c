"""A contract for import-linter: which external packages a part of the project may import, and no others."""

from __future__ import annotations

import sys

import grimp
from importlinter import Contract, ContractCheck, fields, output


class ExternalsContract(Contract):
    """The modules of some packages may import the standard library, the project and the named packages only.

    Options of the contract: ``packages`` and ``allowed`` (top-level names).
    """

    packages = fields.SetField(subfield=fields.StringField())
    allowed = fields.SetField(subfield=fields.StringField())

    def check(self, graph: grimp.ImportGraph, verbose: bool) -> ContractCheck:
        """Find imports of other packages."""
        ours = {"pipeline", "service"} | set(sys.stdlib_module_names) | set(self.allowed)  # type: ignore[call-overload]
        foreign = {
            (module, imported)
            for module in graph.modules
            if self._is_covered(module)
            for imported in graph.find_modules_directly_imported_by(module)
            if imported.partition(".")[0] not in ours
        }
        return ContractCheck(kept=not foreign, metadata={"foreign": sorted(foreign)})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Name each module and what it imports."""
        for module, imported in check.metadata["foreign"]:
            output.print_error(f"{module} imports {imported}, which is not in its list of allowed packages.")

    def _is_covered(self, module: str) -> bool:
        return any(module == package or module.startswith(f"{package}.") for package in self.packages)  # type: ignore[attr-defined]

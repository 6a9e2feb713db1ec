"""The replacements that a target allows: its pins, its kinds of variants, its runtimes and its exports' needs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from storage.files import InputError
from storage.formats import FORMATS, FormatName
from storage.metrics import METRICS
from storage.records import Runtime
from storage.targets import Pin, Target
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.runtimes.rules import child_rules, is_empty, reasons_against, refusals
from tasks.puzzle.search.problem import Limit
from tasks.targets.parent_facts import ParentFacts

_OR_FORMATS = ", and gguf formats out of export_child.formats"


def with_export_needs(target: Target, formats: Iterable[FormatName]) -> Target:
    """Return the target, narrowed to children that every export format can hold (storage/formats.py)."""
    runtimes, allowed = target.runtimes, target.allowed
    export_formats = [FORMATS[name] for name in formats]
    for export_format in export_formats:
        if export_format.runtime and export_format.runtime not in runtimes:
            runtimes = (*runtimes, export_format.runtime)
    if not all(export_format.allows_linear for export_format in export_formats):
        attention = tuple(kind for kind in allowed.attention if kind != "linear")
        ffn = tuple(kind for kind in allowed.ffn if kind != "linear")
        allowed = allowed.model_copy(update={"attention": attention, "ffn": ffn})
    return target.model_copy(update={"runtimes": runtimes, "allowed": allowed})


@dataclass(frozen=True)
class AllowedReplacements:
    """The rules of one target for one parent; `target_name` is the target's key in params.yaml."""

    target_name: str
    target: Target
    parent: ParentFacts

    @property
    def runtimes(self) -> tuple[Runtime, ...]:
        """Return the runtimes that the target names, and llama.cpp where a limit on a speed holds in it."""
        named, constraints = self.target.runtimes, self.target.constraints.values()
        has_limit = any(METRICS[limit.metric].speed and limit.engine == "llama.cpp" for limit in constraints)
        return (*named, "llama.cpp") if has_limit and "llama.cpp" not in named else named

    def check_target(self) -> None:
        """Raise InputError if a runtime refuses every child, or a pin names a block that the parent does not have."""
        if self.target.runtimes and not self.parent.config:
            raise InputError(
                f"targets.{self.target_name}.runtimes needs the parent's geometry; give --parent CONFIG_JSON"
            )
        for runtime in self.target.runtimes:
            assert self.parent.config is not None
            reasons = reasons_against(runtime, self.parent.config, 1, Attention("no_op"), Ffn("no_op"))
            if reasons:
                raise InputError(
                    f"{self.target_name}: no child of {self.parent.name} runs in {runtime}: {'; '.join(reasons)}; "
                    f"take it out of targets.{self.target_name}.runtimes"
                    f"{_OR_FORMATS if runtime == 'llama.cpp' else ''}"
                )
        last = len(self.parent.blocks) - 1
        for pin in self.target.pins:
            if max(pin.blocks) > last:
                raise InputError(
                    f"targets.{self.target_name}.pins names block {max(pin.blocks)}; {self.parent.name} has blocks 0 "
                    f"to {last}"
                )

    def allows(self, replacement: Replacement) -> bool:
        """Tell whether pins, kinds and runtimes let a replacement be chosen."""
        if replacement.span > 1 and not self.target.allowed.spans:
            return False
        if not all(self._keeps(pin, replacement) for pin in self.target.pins):
            return False
        return self._has_allowed_kinds(replacement) and self._runs(replacement)

    def _keeps(self, pin: Pin, replacement: Replacement) -> bool:
        """Tell whether a replacement keeps what a pin keeps of the parent's block."""
        if not set(pin.blocks) & set(replacement.parent_blocks):
            return True
        parent = self.parent.blocks[replacement.first_block]
        is_kept = {
            "attention": replacement.attention == parent.attention,
            "ffn": replacement.ffn == parent.ffn,
            "block": replacement == parent,
        }
        return replacement.span == 1 and is_kept[pin.keep]

    def _has_allowed_kinds(self, replacement: Replacement) -> bool:
        """Tell whether both variants are the parent's or of a kind that is allowed."""
        parent, allowed = self.parent.blocks[replacement.first_block], self.target.allowed
        attention, ffn = replacement.attention, replacement.ffn
        has_attention = attention == parent.attention or attention.kind in allowed.attention
        return has_attention and (ffn == parent.ffn or ffn.kind in allowed.ffn)

    def _runs(self, replacement: Replacement) -> bool:
        """Tell whether every runtime computes a child with this block right."""
        config = self.parent.config
        if config is None:
            return True
        first_block, attention, ffn = replacement.first_block, replacement.attention, replacement.ffn
        return not any(reasons_against(runtime, config, first_block, attention, ffn) for runtime in self.runtimes)

    def rules(self, replacements: Sequence[Replacement]) -> tuple[Limit, ...]:
        """Return what a child of these replacements must keep as a whole; the search takes no other."""
        choices = [(block.first_block, block.attention, block.ffn) for block in replacements]
        return tuple(
            Limit(
                name=f"rule {number}",
                text=rule.text,
                coefficients=tuple(-float(weight) for weight in rule.weights),
                constant=float(rule.at_least),
                upper=0.0,
                is_rule=True,
            )
            for number, rule in enumerate(child_rules(self.runtimes, choices))
        )

    def check_child(self, blocks: Sequence[Replacement]) -> None:
        """Refuse a whole child, such as the search would not have chosen.

        Raises:
            InputError: it is empty, or a runtime refuses it for a reason that no single block shows.
        """
        if is_empty([(block.attention, block.ffn) for block in blocks]):
            raise InputError(
                f"{self.target_name}: the best child has no attention and no FFN in any block, so there is nothing to "
                f"train; loosen targets.{self.target_name}.constraints or add "
                "{metric: attention_blocks, at_least: 1}"
            )
        config = self.parent.config
        if config is None:
            return
        against = refusals(config, [(block.attention, block.ffn) for block in blocks])
        for runtime in self.runtimes:
            if against[runtime]:
                reasons = "; ".join(f"{refusal.text} ({refusal.way_out})" for refusal in against[runtime])
                raise InputError(f"{self.target_name}: the best child does not run in {runtime}: {reasons}")

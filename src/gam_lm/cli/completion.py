"""`gam completion`: a script for the shell that completes verbs, flags and their choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

SCRIPT = """# Completes verbs and flags of gam, and paths elsewhere.
_gam() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" verb="${{COMP_WORDS[1]}}"
  case "$verb ${{COMP_WORDS[2]}}" in
{pairs}
  esac
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
    return
  fi
  case "$verb" in
{flags}
  esac
}}
complete -o default -F _gam gam
"""

FLAGS = """    "{verb}")
      case "$before" in
{choices}
        *) case "$word" in --*) COMPREPLY=($(compgen -W "{flags}" -- "$word"));; esac;;
      esac;;"""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Print a script that completes verbs, flags and their choices in your shell: `eval "$(gam completion bash)"` in ~/.bashrc."""

    shell: Literal["bash", "zsh"]
    """The shell; for zsh put the line into ~/.zshrc."""

    def run(self) -> None:
        """Print the script."""
        print(("autoload -Uz bashcompinit && bashcompinit\n" if self.shell == "zsh" else "") + script(), end="")


def script() -> str:
    """For bash."""
    from gam_lm.cli.flag_list import flags_of
    from gam_lm.cli.main import VERBS, verb_class

    pairs = "\n".join(f'    "{name}") verb="{name}";;' for name in VERBS if " " in name)
    firsts: dict[str, list[str]] = {}
    for name in VERBS:
        first, _, second = name.partition(" ")
        firsts.setdefault(first, []).extend([second] if second else [])
    parts = [f'    "{first}") COMPREPLY=($(compgen -W "{" ".join(seconds)}" -- "$word"));;' for first, seconds in firsts.items() if seconds]
    for name in VERBS:
        flags = [flag for flag in flags_of(verb_class(name)) if not flag.positional]
        written = [f"--{flag.name.replace('_', '-')}" for flag in flags]
        choices = "\n".join(
            f'        {label}) COMPREPLY=($(compgen -W "{" ".join(values)}" -- "$word"));;'
            for label, flag in zip(written, flags, strict=True) if (values := _choices(flag.hint))
        )  # fmt: skip
        words = " ".join([*written, "--config", "--help", "--help-all"])
        parts.append(FLAGS.format(verb=name, choices=choices, flags=words))
    return SCRIPT.format(pairs=pairs, verbs=" ".join(firsts), flags="\n".join(parts))


def _choices(hint: Any) -> list[str]:
    """What a flag of a fixed list may be."""
    if get_origin(hint) is Literal:
        return [str(each) for each in get_args(hint)]
    return [value for each in get_args(hint) for value in _choices(each)]

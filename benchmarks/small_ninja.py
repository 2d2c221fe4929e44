"""Stands in for ``ninja -v -j N`` on a file written by torch, on machines without ninja: compiles in parallel.

torch compiles one file after the other if it finds no ninja, which takes minutes. This reads variables, rules with a
command, and builds; a target is up to date if it is newer than its source and the headers that the compiler listed.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    target: str
    sources: tuple[str, ...]
    command: str

    def is_current(self) -> bool:
        target, listed = Path(self.target), Path(f"{self.target}.d")
        if not target.exists() or not listed.exists():
            return False
        text = listed.read_text().replace("\\\n", " ").split(":", 1)[-1]
        names = [name.replace("\\ ", " ") for name in re.findall(r"(?:\\ |\S)+", text)]
        made = target.stat().st_mtime
        return all(Path(name).exists() and Path(name).stat().st_mtime <= made for name in (*self.sources, *names))


def _expand(text: str, variables: dict[str, str]) -> str:
    """Variables and escapes ($$, "$ ", "$:") replaced."""

    def replace(match: re.Match) -> str:
        if match[1] is not None:
            return match[1]
        return _expand(variables.get(match[2] or match[3], ""), variables)

    return re.sub(r"\$(?:([$ :])|\{(\w+)\}|(\w+))", replace, text)


def _words(text: str) -> list[str]:
    """Paths of a build line, still escaped."""
    return re.findall(r"(?:\$.|[^\s$])+", text)


def parse(text: str) -> list[Job]:
    """The compilations of a build file."""
    variables: dict[str, str] = {}
    commands: dict[str, str] = {}
    jobs = []
    rule = None
    for line in text.replace("$\n", " ").split("\n"):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if line.startswith("rule "):
            rule = line.split()[1]
        elif line.startswith("build "):
            targets, rest = re.split(r"(?<!\$):", line[len("build ") :], maxsplit=1)
            name, *sources = _words(rest)
            (target,) = (_expand(word, {}) for word in _words(targets))
            paths = tuple(_expand(word, {}) for word in sources)
            values = {**variables, "in": " ".join(paths), "out": target}
            jobs.append(Job(target, paths, _expand(commands[name], values)))
        elif line.startswith("default "):
            continue
        elif "=" in line:
            name, value = (part.strip() for part in line.split("=", 1))
            if line[0].isspace():
                if rule is not None and name == "command":
                    commands[rule] = value
            else:
                variables[name] = value
    return jobs


def main(arguments: list[str]) -> int:
    if "--version" in arguments:
        print("1.11.0 (a part of it)")
        return 0
    workers = os.cpu_count() or 1
    if "-j" in arguments:
        workers = int(arguments[arguments.index("-j") + 1])
    jobs = [job for job in parse(Path("build.ninja").read_text()) if not job.is_current()]
    failed = 0
    with ThreadPoolExecutor(workers) as pool:
        running = {
            pool.submit(subprocess.run, job.command, shell=True, capture_output=True, text=True): job for job in jobs
        }
        for number, future in enumerate(as_completed(running), 1):
            job, result = running[future], future.result()
            print(f"[{number}/{len(jobs)}] {job.command}\n{result.stdout}{result.stderr}", flush=True)
            failed += result.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

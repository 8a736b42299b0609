#!/usr/bin/env bash
# The history, from nothing: the suite of this checkout against every milestone, oldest first, then the page.
#
#     bash bench/backfill.sh [options of asv run]      bash bench/backfill.sh --quick --dry-run     to see that all of it runs
#
# Each commit is built and installed into a virtual environment of asv's own (.asv, 2.7 GB; a minute or two for the first).
# What a commit does not have yet is "n/a". Commits that were measured before are left alone. On two idle cores about ten
# minutes a commit; nothing else should run meanwhile.
set -euo pipefail
cd "$(dirname "$0")/.."
asv machine --yes
git rev-parse \
  a8b3eae `# the main job: surgery, token stream, distillation, packed export` \
  6e35e53 `# packed file version 2: blocks that kernels run as they lie` \
  0cfe590 `# the CPU runtime, the GPU kernels, the LM head inside the loss` \
  02f3b6f `# the same, checked and cleaned` \
  HEAD |
  asv run --skip-existing-successful --show-stderr "$@" HASHFILE:-
[[ " $* " == *dry-run* ]] || python bench/history.py

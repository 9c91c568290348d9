#!/usr/bin/env bash
# Draws docs/report.png anew: the HTML report of made-up results, in headless Chromium.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$repo/scripts/lib.sh"
cd "$repo"

need_toolchain
need chromium chromium
need fonts-dejavu-core /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf
install_needed

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cargo run --locked --quiet -p vmlab --example report html >"$work/page.html"
# The page is our own, and Chromium's sandbox works for no root.
env HOME="$work" TMPDIR="$work" timeout --kill-after=5 120 \
    chromium --headless --no-sandbox --disable-gpu --disable-breakpad --hide-scrollbars \
    --window-size=1200,1500 --virtual-time-budget=2000 --user-data-dir="$work/profile" \
    --screenshot="$work/report.png" "file://$work/page.html" >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    die "chromium took no screenshot"
}
cp "$work/report.png" docs/report.png
say "docs/report.png, $(stat -c %s docs/report.png) bytes"

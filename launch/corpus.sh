#!/usr/bin/env bash
# Makes DIR, a folder of long documents as plain text for training: from the manuals and
# books of six Debian packages (90 MB from apt, no root needed), or from FOLDERs of yours.
#   launch/corpus.sh DIR [FOLDER ...]
set -euo pipefail
: "${1:?usage: $0 DIR [FOLDER ...]}"
python="$(dirname "$0")/../.venv/bin/python"
convert() { PYTHONPATH="$(dirname "$0")/.." "$python" "$(dirname "$0")/corpus.py" "$@"; }
(($# == 1)) || { convert "$@"; exit; }

packages=(anarchism bible-kjv-text debian-handbook jargon-text linux-doc-6.1 perl-doc)
remedy="name folders of your own text instead: $0 $1 FOLDER ..."
out=$(realpath -m "$1")
[[ ! -e $out ]] || { echo "error: DIR=$1 exists; name a new folder" >&2; exit 1; }
type apt-get dpkg >/dev/null 2>&1 ||
  { echo "error: apt-get and dpkg are not here (this needs Debian); $remedy" >&2; exit 1; }
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
for package in "${packages[@]}" bible-kjv; do # bible-kjv holds the reader of its text
  (cd "$new" && apt-get -qq download "$package" 2>log) ||
    { echo "left out: $package: $(grep -m1 '^E' "$new/log" || echo "no network")"; continue; }
  dpkg -x "$new/${package}_"*.deb "$new/$package"
done
texts=()
add() { # PACKAGE FOLDER: its documents are below this folder
  [[ ! -d $new/$1/$2 ]] || texts+=("$1=$new/$1/$2")
}
add anarchism usr/share/doc/anarchism/html
add debian-handbook usr/share/doc/debian-handbook/html/en-US
add jargon-text usr/share/doc/jargon-text
add linux-doc-6.1 usr/share/doc/linux-doc-6.1/Documentation
for folder in "$new"/perl-doc/usr/share/perl/*/pod/; do # named by the version of Perl
  add perl-doc "${folder#"$new"/perl-doc/}"
done
if [[ -d $new/bible-kjv && -d $new/bible-kjv-text ]]; then
  mkdir "$new/books" # "1Chr2:3 TEXT" becomes "2:3 TEXT" in 1chr.txt
  "$new/bible-kjv/usr/bin/bible" -f -p "$new/bible-kjv-text/usr/lib" gen1:1-rev22:21 \
    </dev/null | awk -v to="$new/books" '{ match($1, /[0-9]+:[0-9]+$/)
      print substr($0, RSTART) > (to "/" tolower(substr($1, 1, RSTART - 1)) ".txt") }'
  texts+=("bible-kjv-text=$new/books")
fi
((${#texts[@]})) || { echo "error: apt-get brought none of the packages; $remedy" >&2; exit 1; }
convert "$out" "${texts[@]}"

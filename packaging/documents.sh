#!/bin/sh
# documents.sh DIR: installs the documents into DIR, all in one folder but for those of
# docs/examples and docs/results, and changes the links between them accordingly.
set -eu

[ $# = 1 ] || {
	echo "usage: $0 DIR" >&2
	exit 2
}
install -d "$1/examples" "$1/results"
doc=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

# put FOLDER LINKS FILE...: copies files, and changes links by a script of sed.
put() {
	folder=$1 links=$2
	shift 2
	for file; do
		sed -e "$links" "$file" >"$folder/${file##*/}"
		chmod 0644 "$folder/${file##*/}"
	done
}
put "$doc" 's,](docs/,](,g; s,](LICENSE),](copyright),g' README.md CHANGELOG.md CONTRIBUTING.md
put "$doc" 's,](\.\./,](,g' docs/*.md
put "$doc/examples" 's,](\.\./\.\./,](../,g' docs/examples/*.md
put "$doc/results" 's,](\.\./\.\./,](../,g' docs/results/*.md
install -m 0644 LICENSE "$doc/copyright"

#!/bin/sh
# Runs every fuzz target of the module for FUZZTIME each.
set -eu
GO=${GO:-go} FUZZTIME=${FUZZTIME:-10s}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# fuzz runs one target, and the inputs known of it once more if its time ran out in
# a bad moment: then go test takes its own deadline for a failure, without an input
# that fails (golang.org/issue/75804).
fuzz() {
	# Minimising would take most of a short time.
	{
		"$GO" test -run '^$' -fuzz "^$1\$" -fuzztime "$FUZZTIME" -fuzzminimizetime 200x "$2" </dev/null 2>&1 || echo 'fuzz failed'
	} | tee "$log"
	tail -n 1 "$log" | grep -qx 'fuzz failed' || return 0
	grep -qx ' *context deadline exceeded' "$log" && ! grep -q -e 'Failing input' -e 'panic:' -e '_test.go:' "$log" || return 1
	"$GO" test -run "^$1\$" "$2"
}

grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u | while read -r dir; do
	for target in $(grep -h -o '^func Fuzz[A-Za-z0-9_]*' "$dir"/*_test.go | sed 's/^func //'); do
		echo "fuzz $dir $target"
		fuzz "$target" "$dir"
	done
done

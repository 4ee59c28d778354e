// Package nettest writes addresses in tests.
package nettest

import "net/netip"

// Prefixes parses prefixes and panics at one that is malformed.
func Prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

package packet

import (
	"net/netip"
	"testing"
)

// A prefix is private if all it covers is, whatever its first address is.
func TestPrivate(t *testing.T) {
	for p, want := range map[string]bool{
		"10.0.0.0/8": true, "10.1.2.3/32": true, "10.0.0.0/7": true, "10.0.0.0/6": false, "10.0.0.0/1": false,
		"22.0.0.0/7": false, "21.0.0.0/8": true, "28.0.0.0/7": true, "28.0.0.0/6": false, "30.0.0.0/7": false,
		"172.16.0.0/12": true, "172.16.0.0/11": false, "192.168.0.0/16": true, "192.168.0.0/15": false,
		"100.64.0.0/10": true, "100.64.0.0/9": false, "8.8.8.0/24": false, "0.0.0.0/0": false, "127.0.0.0/8": false,
		"169.254.0.0/16": false, "224.0.0.0/4": false, "240.0.0.0/4": false, "241.0.0.0/8": true, "203.0.113.0/24": true, "203.0.112.0/23": false,
		"10.200.0.1/7": true, "172.31.0.10/11": false,
		"fc00::/7": true, "fc00::/6": false, "fd00::1/128": true, "fe80::/10": false, "2001:db8::/32": false, "::/0": false,
		"::ffff:10.0.0.0/104": false,
	} {
		if got := Private(netip.MustParsePrefix(p)); got != want {
			t.Errorf("Private(%s) = %v, want %v", p, got, want)
		}
	}
}

// The table of classes gives every address at most one class.
func TestScopesApart(t *testing.T) {
	for i, x := range scopes4 {
		for _, y := range scopes4[:i] {
			if x.prefix.Overlaps(y.prefix) {
				t.Errorf("%s and %s overlap", x.prefix, y.prefix)
			}
		}
	}
}

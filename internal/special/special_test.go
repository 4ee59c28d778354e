package special

import (
	"net/netip"
	"testing"
)

func TestIsMetadata(t *testing.T) {
	for a, want := range map[string]bool{
		"169.254.169.254": true, "169.254.0.1": true, "fe80::1": true, "fe80::1%eth0": true,
		"fd00:ec2::254": true, "fd00:ec2::253": true, "fd00:ec2::123": true, "fd00:ec3::254": false,
		"fd20:ce::254": true, "fd20:ce::253": false, "fd00:c1::a9fe:a9fe": true, "fd00:c1::1": false,
		"fd00:42::42": true, "fd00:42::41": false, "100.100.100.200": true, "100.100.100.201": false, "168.63.129.16": true, "168.63.129.17": false,
		"192.0.0.192": true, "192.0.0.193": false,
		"::ffff:169.254.169.254": true, "::ffff:10.0.0.1": false, "64:ff9b::a9fe:a9fe": true, "64:ff9b::a00:1": false,
		"10.0.0.1": false, "2001:db8::1": false,
	} {
		if got := IsMetadata(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: %v, want %v", a, got, want)
		}
	}
}

func TestMetadataIsACopy(t *testing.T) {
	Metadata()[0] = netip.Prefix{}
	for _, p := range Metadata() {
		if !p.IsValid() || p != p.Masked() || !IsMetadata(p.Addr()) {
			t.Errorf("%v is no prefix of a metadata service", p)
		}
	}
}

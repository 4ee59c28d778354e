package vl2

import (
	"bytes"
	"testing"

	"ztgate/zerotier/identity"
)

type vecNode struct {
	Name   string `json:"name"`
	Secret string `json:"identity_secret"`
}

// identities parses the nodes of a vector file by name.
func identities(t testing.TB, list []vecNode) map[string]*identity.Identity {
	t.Helper()
	out := make(map[string]*identity.Identity)
	for _, n := range list {
		id, err := identity.Parse(n.Secret)
		if err != nil {
			t.Fatalf("parse identity of %s: %v", n.Name, err)
		}
		out[n.Name] = id
	}
	return out
}

func byAddress(ids map[string]*identity.Identity) map[identity.Address]*identity.Identity {
	out := make(map[identity.Address]*identity.Identity)
	for _, id := range ids {
		out[id.Address()] = id
	}
	return out
}

func vecAddress(t testing.TB, s string) identity.Address {
	t.Helper()
	a, err := identity.ParseAddress(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func vecNetwork(t testing.TB, s string) NetworkID {
	t.Helper()
	n, err := ParseNetworkID(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func wantBytes(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("%s:\ngot  %x\nwant %x", what, got, want)
	}
}

func wantEqual[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

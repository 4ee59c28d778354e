package vl2

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/testvec"
)

// The specialists of a configuration are read as release 1.16.2 reads them, and anchors of
// older controllers are kept in contact too.
func TestSpecialists(t *testing.T) {
	var v struct {
		Capacity int `json:"dictionary_capacity_1_16_0"`
		Cases    []struct {
			Name       string
			Dictionary testvec.Hex `json:"dictionary_hex"`
			Read       struct {
				Accepted    bool
				Count       int
				Last        string
				Bridges     []string `json:"active_bridges"`
				Replicators []string `json:"multicast_replicators"`
				Contacts    []string `json:"always_contact"`
			} `json:"read_512"`
		}
	}
	testvec.Load(t, "specialists-512.json", &v)
	count := testvec.Count(t, "specialists-512.json", "cases")
	testvec.Count(t, "specialists-512.json", "dictionary_capacity_1_16_0").Judge()
	if v.Capacity != MaxConfigSent+1 { // with a zero at its end
		t.Errorf("1.16.0 takes dictionaries of %d bytes", v.Capacity)
	}
	text := func(list []identity.Address) []string {
		out := []string{}
		for _, a := range list {
			if s := a.String(); !slices.Contains(out, s) {
				out = append(out, s)
			}
		}
		return out
	}
	unique := func(list []string) []string {
		out := []string{}
		for _, s := range list {
			if !slices.Contains(out, s) {
				out = append(out, s)
			}
		}
		return out
	}
	for _, c := range v.Cases {
		count.Judge()
		cfg, err := DecodeNetworkConfig(c.Dictionary)
		if (err == nil) != c.Read.Accepted {
			t.Fatalf("%s: %v", c.Name, err)
		}
		last := cfg.Specialists[len(cfg.Specialists)-1]
		if got := fmt.Sprintf("%016x", last.Roles|uint64(last.Address)); len(cfg.Specialists) != c.Read.Count || got != c.Read.Last {
			t.Errorf("%s: %d entries, the last is %s, want %d, %s", c.Name, len(cfg.Specialists), got, c.Read.Count, c.Read.Last)
		}
		if got := text(cfg.Bridges()); !slices.Equal(got, unique(c.Read.Bridges)) {
			t.Errorf("%s: bridges %v, want %v", c.Name, got, c.Read.Bridges)
		}
		replicators := text(cfg.Replicators())
		if !slices.Equal(replicators, unique(c.Read.Replicators)) {
			t.Errorf("%s: replicators %v, want %v", c.Name, replicators, c.Read.Replicators)
		}
		want := unique(c.Read.Contacts)
		for _, s := range cfg.Specialists {
			if s.Roles&RoleAnchor != 0 && !slices.Contains(want, s.Address.String()) {
				want = append(want, s.Address.String())
			}
		}
		got := cfg.Contacts()
		if first := text(got[:len(replicators)]); !slices.Equal(first, replicators) {
			t.Errorf("%s: the first contacts are %v", c.Name, first)
		}
		if len(got) != len(text(got)) {
			t.Errorf("%s: contacts %v", c.Name, got)
		}
		sorted := text(got)
		slices.Sort(sorted)
		slices.Sort(want)
		if !slices.Equal(sorted, want) {
			t.Errorf("%s: contacts %v, want %v", c.Name, sorted, want)
		}
	}
}

// A dictionary as large as the newest release sends is put together from chunks for the
// smallest MTU, and nothing is kept for a larger one.
func TestDictionaryBound(t *testing.T) {
	id, err := identity.Generate(nil)
	if err != nil {
		t.Fatal(err)
	}
	n := NetworkID(id.Address())<<24 | 1
	dict := bytes.Repeat([]byte("k=v\n"), MaxConfig/4)
	payloads, err := AppendChunks(id, n, dict, 7, 1)
	if err != nil {
		t.Fatal(err)
	}
	var a Assembler
	now := time.Unix(1760000000, 0)
	for i, b := range payloads {
		c, err := ParseChunk(b)
		if err != nil {
			t.Fatal(err)
		}
		got, fresh := a.Add(now, c)
		if whole := i == len(payloads)-1; !fresh || (got != nil) != whole || whole && !bytes.Equal(got, dict) {
			t.Fatalf("chunk %d of %d: fresh %v, %d bytes", i, len(payloads), fresh, len(got))
		}
	}
	payloads, err = AppendChunks(id, n, append(dict, '\n'), 8, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseChunk(payloads[0]); err == nil {
		t.Error("takes a chunk of a larger one")
	}
}

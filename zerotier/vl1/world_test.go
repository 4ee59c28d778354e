package vl1

import (
	"bytes"
	"testing"

	"ztgate/zerotier/internal/testvec"
)

func TestWorldVectors(t *testing.T) {
	var v struct {
		Default struct {
			Hex    testvec.Hex `json:"hex"`
			Signed testvec.Hex `json:"signed_message_hex"`
		} `json:"default_planet"`
		Custom map[string]struct {
			Hex     testvec.Hex `json:"hex"`
			Public  testvec.Hex `json:"public"`
			Private testvec.Hex `json:"private"`
			Signed  testvec.Hex `json:"signed_message_hex"`
			Key1    struct {
				Public  testvec.Hex `json:"public"`
				Private testvec.Hex `json:"private"`
			} `json:"key1"`
		} `json:"custom_planet"`
		Moon struct {
			Hex    testvec.Hex `json:"hex"`
			Signed testvec.Hex `json:"signed_message_hex"`
			Keys   struct {
				Key1 struct {
					Public  testvec.Hex `json:"public"`
					Private testvec.Hex `json:"private"`
				} `json:"key1"`
			} `json:"keys"`
		} `json:"moon"`
		Cases []struct {
			Case     string      `json:"case"`
			Current  testvec.Hex `json:"current_hex"`
			Update   testvec.Hex `json:"update_hex"`
			Accepted bool        `json:"accepted"`
		} `json:"update_cases"`
	}
	testvec.Load(t, "world.json", &v)
	check := func(name string, hex, signed, priv []byte) {
		w, n, err := ParseWorld(hex)
		if err != nil || n != len(hex) {
			t.Fatalf("%s: %d %v", name, n, err)
		}
		if !bytes.Equal(w.Append(nil), hex) {
			t.Errorf("%s: re-encoding differs", name)
		}
		if !bytes.Equal(w.signedMessage(), signed) {
			t.Errorf("%s: signed message differs", name)
		}
		if priv != nil {
			sig := w.Signature
			w.Sign(Key(priv))
			if sig != w.Signature {
				t.Errorf("%s: signature differs", name)
			}
		}
		for i := range hex {
			if _, _, err := ParseWorld(hex[:i]); err == nil {
				t.Fatalf("%s: cut at %d accepted", name, i)
			}
		}
	}
	for _, field := range []string{"default_planet", "custom_planet", "moon"} {
		testvec.Count(t, "world.json", field).Judge()
	}
	check("default", v.Default.Hex, v.Default.Signed, nil)
	k := v.Custom["keys"].Key1.Private
	check("rev1", v.Custom["revision1"].Hex, v.Custom["revision1"].Signed, k)
	check("rev2", v.Custom["revision2"].Hex, v.Custom["revision2"].Signed, nil)
	check("moon", v.Moon.Hex, v.Moon.Signed, v.Moon.Keys.Key1.Private)
	if d := DefaultPlanet(); !bytes.Equal(d.Append(nil), v.Default.Hex) || !d.Verify(d.UpdateKey) {
		t.Error("default planet")
	}
	cases := testvec.Count(t, "world.json", "update_cases")
	for _, c := range v.Cases {
		cases.Judge()
		var cur *World
		if len(c.Current) > 0 {
			cur, _, _ = ParseWorld(c.Current)
		}
		up, _, err := ParseWorld(c.Update)
		if err != nil || up.Replaces(cur) != c.Accepted {
			t.Errorf("%s: %v", c.Case, err)
		}
	}
}

func FuzzWorld(f *testing.F) {
	f.Add(defaultPlanet)
	var v struct {
		Moon struct {
			Hex testvec.Hex `json:"hex"`
		} `json:"moon"`
	}
	testvec.Load(f, "world.json", &v)
	f.Add([]byte(v.Moon.Hex))
	f.Fuzz(func(t *testing.T, b []byte) {
		w, n, err := ParseWorld(b)
		if err != nil {
			return
		}
		if n > len(b) || len(w.Roots) > MaxRoots {
			t.Fatalf("%d of %d bytes, %d roots", n, len(b), len(w.Roots))
		}
		again, m, err := ParseWorld(w.Append(nil))
		if err != nil || m != len(w.Append(nil)) || again.ID != w.ID || !bytes.Equal(again.Append(nil), w.Append(nil)) {
			t.Fatalf("what is written can't be read: %v", err)
		}
		if w.Replaces(DefaultPlanet()) && n != len(defaultPlanet) {
			t.Fatal("a forged planet is accepted")
		}
	})
}

func FuzzPeerRecord(f *testing.F) {
	f.Add((&PeerRecord{Identity: DefaultPlanet().Roots[0].Identity, ProtocolVersion: 12, Endpoints: DefaultPlanet().Roots[0].Endpoints}).Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParsePeerRecord(b)
		if err != nil {
			return
		}
		if len(r.Endpoints) > maxPathsInRecord {
			t.Fatalf("%d endpoints", len(r.Endpoints))
		}
		again, err := ParsePeerRecord(r.Append(nil))
		if err != nil || !again.Identity.Equal(r.Identity) || len(again.Endpoints) != len(r.Endpoints) {
			t.Fatalf("what is written can't be read: %v", err)
		}
	})
}

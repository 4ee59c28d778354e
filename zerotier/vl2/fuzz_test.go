package vl2_test

import (
	"bytes"
	"testing"
	"time"

	"ztgate/zerotier/internal/testvec"
	"ztgate/zerotier/vl2"
)

var testTime = time.Unix(1_760_000_000, 0)

func FuzzDictionary(f *testing.F) {
	f.Add([]byte("v=7\nn=a\\nb\nx"))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := vl2.ParseDictionary(b)
		for k := range d {
			d.Integer(k, 0)
			d.Boolean(k)
		}
	})
}

func FuzzNetworkConfig(f *testing.F) {
	c, _ := vl2.AdHocConfig(0xff00160016000000, 0x4dd8dab0a9, 1)
	f.Add(c.Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := vl2.DecodeNetworkConfig(b)
		if err != nil {
			return
		}
		again, err := vl2.DecodeNetworkConfig(c.Encode())
		if err != nil || !bytes.Equal(again.Encode(), c.Encode()) {
			t.Errorf("does not survive a round trip: %v", err)
		}
	})
}

func FuzzCredentials(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		list, _ := vl2.ParseCredentials(b)
		if _, err := vl2.ParseCredentials(vl2.AppendCredentials(nil, list...)); err != nil {
			t.Errorf("does not survive a round trip: %v", err)
		}
	})
}

func FuzzChunk(f *testing.F) {
	f.Add(make([]byte, 140))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := vl2.ParseChunk(b)
		if err != nil {
			return
		}
		var a vl2.Assembler
		if d, _ := a.Add(testTime, c); d != nil && len(d) != c.Total {
			t.Errorf("assembled %d of %d bytes", len(d), c.Total)
		}
	})
}

func FuzzRules(f *testing.F) {
	f.Add([]byte{0x25, 2, 8, 0, 1, 0}, make([]byte, 60), true)
	f.Fuzz(func(t *testing.T, table, frame []byte, inbound bool) {
		rules, err := vl2.ParseRules(table, vl2.MaxRules)
		if err != nil {
			return
		}
		own := &vl2.NetworkConfig{Member: 1}
		for _, et := range []uint16{vl2.EtherTypeIPv4, vl2.EtherTypeIPv6, vl2.EtherTypeARP} {
			ev := vl2.Evaluate(rules, &vl2.FrameInfo{Inbound: inbound, EtherType: et, Data: frame, Source: 2, Destination: 1}, own, nil)
			if ev.Copy.Length > len(frame) {
				t.Errorf("copy of %d of %d bytes", ev.Copy.Length, len(frame))
			}
			vl2.EmulateNDP(own, et, frame)
			vl2.GroupOf(vl2.BroadcastMAC, et, frame)
		}
	})
}

func FuzzFrames(f *testing.F) {
	f.Add(make([]byte, 40))
	f.Fuzz(func(t *testing.T, b []byte) {
		if x, err := vl2.ParseExtFrame(b); err == nil && len(x.Data) > len(b) {
			t.Error("data longer than the packet")
		}
		if x, err := vl2.ParseMulticastFrame(b); err == nil && len(x.Data) > len(b) {
			t.Error("data longer than the packet")
		}
		vl2.ParseGather(b)
		vl2.ParseGatherResult(b)
		vl2.SplitFrameOK(b)
		vl2.ParseConfigRequest(b)
		vl2.ParseLogin(b)
	})
}

func TestRulesNoAllocs(t *testing.T) {
	c, _ := vl2.AdHocConfig(0xff00160016000000, 0x4dd8dab0a9, 1)
	f := &vl2.FrameInfo{EtherType: vl2.EtherTypeIPv6, Data: make([]byte, 100), Source: 2, Destination: 1}
	if n := testing.AllocsPerRun(100, func() { vl2.Evaluate(c.Rules, f, c, nil) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkRules(b *testing.B) {
	c, _ := vl2.AdHocConfig(0xff00160016000000, 0x4dd8dab0a9, 1)
	f := &vl2.FrameInfo{EtherType: vl2.EtherTypeIPv6, Data: make([]byte, 100), Source: 2, Destination: 1}
	b.ReportAllocs()
	for b.Loop() {
		vl2.Evaluate(c.Rules, f, c, nil)
	}
}

// FuzzMessages begins with real messages, so that the deep parts of the parsers are
// reached.
func FuzzMessages(f *testing.F) {
	var v struct {
		Frames []struct{ Payload testvec.Hex } `json:"frame_cases"`
		Groups []struct {
			Packets []struct{ Payload testvec.Hex }
		}
	}
	testvec.Load(f, "vl2-packets.json", &v)
	for _, c := range v.Frames {
		f.Add([]byte(c.Payload))
	}
	for _, g := range v.Groups {
		for _, p := range g.Packets {
			f.Add([]byte(p.Payload))
		}
	}
	var creds struct{ Cases []struct{ Hex testvec.Hex } }
	testvec.Load(f, "credentials.json", &creds)
	for _, c := range creds.Cases {
		f.Add([]byte(c.Hex))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		check := func(c vl2.Credential, n int, err error) {
			if err != nil {
				return
			}
			if n > len(b) {
				t.Fatalf("%T of %d bytes in %d", c, n, len(b))
			}
			c.Holder()
			c.SignedBy()
			if list, err := vl2.ParseCredentials(vl2.AppendCredentials(nil, c)); err != nil || len(list) != 1 {
				t.Errorf("%T does not survive a round trip: %v", c, err)
			}
			new(vl2.Membership).Offer(nil, c)
		}
		for _, kind := range []string{"com", "tag", "capability", "coo", "revocation"} {
			check(parseCredential(kind, b))
		}
		if list, err := vl2.ParseCredentials(b); err == nil && len(list) > len(b)/8+1 {
			t.Errorf("%d credentials in %d bytes", len(list), len(b))
		}
		if c, err := vl2.ParseChunk(b); err == nil {
			vl2.DecodeNetworkConfig(c.Data)
		}
		vl2.ParseExtFrame(b)
		vl2.ParseMulticastFrame(b)
		vl2.ParseGather(b)
	})
}

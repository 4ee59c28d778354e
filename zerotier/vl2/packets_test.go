package vl2

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"testing"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/testvec"
	"ztgate/zerotier/packet"
)

type vecPackets struct {
	Identities []vecNode `json:"identities"`
	Groups     []struct {
		Label   string `json:"label"`
		Packets []struct {
			Src       string        `json:"src"`
			Dst       string        `json:"dst"`
			Verb      uint8         `json:"verb"`
			Payload   testvec.Hex   `json:"payload"`
			Datagrams []testvec.Hex `json:"datagrams"`
		} `json:"packets"`
	} `json:"groups"`
	Frames []struct {
		Name    string         `json:"name"`
		Verb    uint8          `json:"verb_number"`
		Payload testvec.Hex    `json:"payload"`
		Fields  map[string]any `json:"fields"`
	} `json:"frame_cases"`
}

// open reassembles, decrypts and decompresses a captured packet.
func open(t *testing.T, keys *packet.Keys, datagrams []testvec.Hex) []byte {
	t.Helper()
	var s packet.Scratch
	b := bytes.Clone(datagrams[0])
	for _, d := range datagrams[1:] {
		f, err := packet.ParseFragment(d)
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, f.Data()...)
	}
	p, err := packet.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := keys.Open(p, &s); err != nil {
		t.Fatal(err)
	}
	p, err = packet.Decompress(p, make([]byte, packet.MaxPacket))
	if err != nil {
		t.Fatal(err)
	}
	return p.Payload()
}

func TestCapturedPackets(t *testing.T) {
	var v vecPackets
	testvec.Load(t, "vl2-packets.json", &v)
	ids := byAddress(identities(t, v.Identities))
	type pair struct{ a, b identity.Address }
	keys := make(map[pair]*packet.Keys)
	verbs := make(map[packet.Verb]int)
	for _, g := range v.Groups {
		for i, p := range g.Packets {
			src, dst := vecAddress(t, p.Src), vecAddress(t, p.Dst)
			k := keys[pair{src, dst}]
			if k == nil {
				session, err := ids[dst].Agree(ids[src])
				if err != nil {
					t.Fatal(err)
				}
				k = packet.NewKeys(session)
				keys[pair{src, dst}] = k
			}
			payload := open(t, k, p.Datagrams)
			wantBytes(t, "payload", payload, p.Payload)
			again := reencode(t, ids, packet.Verb(p.Verb), payload)
			if !bytes.Equal(again, payload) {
				t.Errorf("%s, packet %d (%v):\ngot  %x\nwant %x", g.Label, i, packet.Verb(p.Verb), again, payload)
			}
			verbs[packet.Verb(p.Verb)]++
		}
	}
	if len(verbs) < 9 {
		t.Errorf("only these verbs were seen: %v", verbs)
	}
}

// reencode takes a message apart to the last byte and puts it together again.
func reencode(t *testing.T, ids map[identity.Address]*identity.Identity, v packet.Verb, b []byte) []byte {
	t.Helper()
	fail := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%v: %v", v, err)
		}
	}
	switch v {
	case packet.VerbFrame:
		n := NetworkIDFromBytes(b)
		return append(binary.BigEndian.AppendUint16(n.Append(nil), binary.BigEndian.Uint16(b[8:])), b[10:]...)
	case packet.VerbExtFrame:
		f, err := ParseExtFrame(b)
		fail(err)
		return AppendExtFrame(nil, f.Network, b[8], f.Destination, f.Source, f.EtherType, f.Data)
	case packet.VerbMulticastFrame:
		f, err := ParseMulticastFrame(b)
		fail(err)
		if b[8]&0x08 != 0 { // sent to a replicator, which we never do
			return b
		}
		var source *MAC
		if f.HasSource {
			source = &f.Source
		}
		return AppendMulticastFrame(nil, f.Network, f.GatherLimit, source, f.Group, f.EtherType, f.Data)
	case packet.VerbMulticastLike:
		var out []byte
		for len(b) > 0 {
			g, ok := ParseGroup(b[8:])
			if !ok {
				t.Fatal("group cut short")
			}
			out = g.Append(NetworkIDFromBytes(b).Append(out))
			b = b[18:]
		}
		return out
	case packet.VerbMulticastGather:
		g, err := ParseGather(b)
		fail(err)
		return AppendGather(nil, g.Network, g.Group, g.Limit, g.COM)
	case packet.VerbNetworkCredentials:
		list, err := ParseCredentials(b)
		fail(err)
		for _, c := range list {
			if id := ids[c.SignedBy()]; id == nil || !c.Verify(id) {
				t.Errorf("%T does not verify", c)
			}
		}
		return AppendCredentials(nil, list...)
	case packet.VerbNetworkConfigRequest:
		n, meta, err := ParseConfigRequest(b)
		fail(err)
		tail := b[len(b)-16:]
		return AppendConfigRequest(nil, n, meta, binary.BigEndian.Uint64(tail), int64(binary.BigEndian.Uint64(tail[8:])))
	case packet.VerbNetworkConfig:
		c, err := ParseChunk(b)
		fail(err)
		return reencodeChunk(t, ids, c)
	case packet.VerbOK:
		rest := b[9:]
		switch packet.Verb(b[0]) {
		case packet.VerbNetworkConfigRequest:
			c, err := ParseChunk(rest)
			fail(err)
			return append(bytes.Clone(b[:9]), reencodeChunk(t, ids, c)...)
		case packet.VerbMulticastGather:
			return append(bytes.Clone(b[:9+18]), reencodeGather(rest[18:])...)
		case packet.VerbMulticastFrame:
			com, gather, has := SplitFrameOK(rest[18:])
			if com != nil || !has {
				t.Fatal("unexpected answer to a multicast frame")
			}
			return append(bytes.Clone(b[:9+19]), reencodeGather(gather)...)
		case packet.VerbEcho:
			return binary.BigEndian.AppendUint64(append(bytes.Clone(b[:9]), rest[:8]...), binary.BigEndian.Uint64(rest[8:]))
		case packet.VerbExtFrame:
			return append(bytes.Clone(b[:9]), NetworkIDFromBytes(rest).Append(nil)...)
		}
	case packet.VerbError:
		return append(bytes.Clone(b[:10]), append(NetworkIDFromBytes(b[10:]).Append(nil), b[18:]...)...)
	}
	t.Fatalf("%v is not handled here", v)
	return nil
}

func reencodeGather(b []byte) []byte {
	list := ParseGatherResult(b)
	out := binary.BigEndian.AppendUint16(bytes.Clone(b[:4]), uint16(len(list)))
	for _, a := range list {
		out = a.Append(out)
	}
	return out
}

func reencodeChunk(t *testing.T, ids map[identity.Address]*identity.Identity, c Chunk) []byte {
	t.Helper()
	controller := ids[c.Network.Controller()]
	if !c.Verify(controller) {
		t.Error("chunk does not verify")
	}
	out := binary.BigEndian.AppendUint16(c.Network.Append(nil), uint16(len(c.Data)))
	out = append(append(out, c.Data...), c.Flags)
	out = binary.BigEndian.AppendUint64(out, c.UpdateID)
	out = binary.BigEndian.AppendUint32(out, uint32(c.Total))
	out = binary.BigEndian.AppendUint32(out, uint32(c.Index))
	out = binary.BigEndian.AppendUint16(append(out, 1), uint16(len(c.Signature)))
	return append(out, c.Signature...)
}

func TestFrameCases(t *testing.T) {
	var v vecPackets
	testvec.Load(t, "vl2-packets.json", &v)
	text := func(m map[string]any, k string) string { s, _ := m[k].(string); return s }
	number := func(m map[string]any, k string) float64 { f, _ := m[k].(float64); return f }
	count := testvec.Count(t, "vl2-packets.json", "frame_cases")
	for _, c := range v.Frames {
		count.Judge()
		t.Run(c.Name, func(t *testing.T) {
			f := c.Fields
			switch packet.Verb(c.Verb) {
			case packet.VerbExtFrame:
				x, err := ParseExtFrame(c.Payload)
				if err != nil {
					t.Fatal(err)
				}
				wantEqual(t, "network", x.Network.String(), text(f, "network_id"))
				wantEqual(t, "destination", hex.EncodeToString(x.Destination[:]), text(f, "dest_mac"))
				wantEqual(t, "source", hex.EncodeToString(x.Source[:]), text(f, "source_mac"))
				wantEqual(t, "ethertype", float64(x.EtherType), number(f, "ethertype"))
				wantEqual(t, "frame", hex.EncodeToString(x.Data), text(f, "frame"))
				wantEqual(t, "acknowledge", x.Acknowledge, f["ack_requested"].(bool))
				wantEqual(t, "certificate", x.COM != nil, f["com"] != nil)
			case packet.VerbMulticastFrame:
				x, err := ParseMulticastFrame(c.Payload)
				if err != nil {
					t.Fatal(err)
				}
				wantEqual(t, "group", hex.EncodeToString(x.Group.Append(nil)), text(f, "dest_mac")+text(f, "adi"))
				wantEqual(t, "gather limit", float64(x.GatherLimit), number(f, "gather_limit"))
				wantEqual(t, "ethertype", float64(x.EtherType), number(f, "ethertype"))
				wantEqual(t, "frame", hex.EncodeToString(x.Data), text(f, "frame"))
				wantEqual(t, "has source", x.HasSource, f["source_mac"] != nil)
				if x.HasSource {
					wantEqual(t, "source", hex.EncodeToString(x.Source[:]), text(f, "source_mac"))
				}
				wantEqual(t, "certificate", x.COM != nil, f["com"] != nil)
			case packet.VerbMulticastGather:
				x, err := ParseGather(c.Payload)
				if err != nil {
					t.Fatal(err) // a malformed certificate is not an error
				}
				if f != nil {
					wantEqual(t, "group", hex.EncodeToString(x.Group.Append(nil)), text(f, "mac")+text(f, "adi"))
					wantEqual(t, "limit", float64(x.Limit), number(f, "limit"))
					wantEqual(t, "certificate", x.COM != nil, f["com"] != nil)
				}
			}
		})
	}
}

// TestTruncated cuts messages at every length: nothing may panic, and what is
// still parsed may not reach beyond the end.
func TestTruncated(t *testing.T) {
	var v vecPackets
	testvec.Load(t, "vl2-packets.json", &v)
	for _, g := range v.Groups {
		for _, p := range g.Packets {
			if len(p.Payload) > 1500 {
				continue
			}
			for n := range len(p.Payload) {
				b := p.Payload[:n:n]
				ParseCredentials(b)
				ParseChunk(b)
				ParseConfigRequest(b)
				ParseExtFrame(b)
				ParseMulticastFrame(b)
				ParseGather(b)
				ParseGatherResult(b)
				SplitFrameOK(b)
				ParseGroup(b)
				ParseLogin(b)
				DecodeNetworkConfig(b)
			}
		}
	}
}

func TestFrameViewsDoNotAllocate(t *testing.T) {
	ext := AppendExtFrame(nil, 1, 0, MAC{2}, MAC{4}, EtherTypeIPv4, make([]byte, 100))
	multicast := AppendMulticastFrame(nil, 1, 1, nil, MulticastGroup{MAC: BroadcastMAC}, EtherTypeARP, make([]byte, 28))
	n := testing.AllocsPerRun(100, func() {
		if _, err := ParseExtFrame(ext); err != nil {
			t.Error(err)
		}
		if _, err := ParseMulticastFrame(multicast); err != nil {
			t.Error(err)
		}
		GroupOf(BroadcastMAC, EtherTypeARP, multicast)
		MACOf(1, AddressOf(1, MAC{2}))
	})
	wantEqual(t, "allocations", n, 0)
}

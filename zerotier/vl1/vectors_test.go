package vl1

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/testvec"
	"ztgate/zerotier/packet"
)

type captured struct {
	Name    string
	Payload testvec.Hex `json:"udp_payload"`
	KeyOf   string      `json:"key_of"`
	Plain   testvec.Hex `json:"payload_plain"`
	Verb    *uint8
	Header  struct {
		Cipher packet.Suite
		ID     string `json:"packet_id"`
	}
	SIV *struct {
		IV testvec.Hex `json:"iv"`
	} `json:"aes_gmac_siv"`
	Fields      json.RawMessage
	Clear       testvec.Hex `json:"plaintext_from_verb"`
	TrustedPath string      `json:"trusted_path_id"`
	Reassembled struct{ Hex testvec.Hex }
	Fragment    struct {
		Dest    string
		Hops    uint8
		Payload testvec.Hex
	}
}

func loadPackets(t testing.TB) (keys map[string]*packet.Keys, list []captured) {
	var v struct {
		Keys    map[string]testvec.Hex `json:"shared_keys"`
		Packets []captured
	}
	testvec.Load(t, "vl1-packets.json", &v)
	keys = make(map[string]*packet.Keys)
	for name, k := range v.Keys {
		keys[name] = packet.NewKeys([48]byte(k))
	}
	return keys, v.Packets
}

func apText(s string) netip.AddrPort {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return netip.AddrPort{}
	}
	if strings.Contains(s, ":") {
		s = "[" + s[:i] + "]:" + s[i+1:]
	} else {
		s = s[:i] + ":" + s[i+1:]
	}
	ap, _ := netip.ParseAddrPort(s)
	return ap
}

// Every captured packet that can be decrypted is, and where it carries a message
// that we build ourselves, building it from its parsed fields gives its bytes.
func TestCapturedPackets(t *testing.T) {
	keys, list := loadPackets(t)
	s := new(packet.Scratch)
	count := testvec.Count(t, "vl1-packets.json", "packets")
	for i, tt := range list {
		count.Judge()
		k := keys[tt.KeyOf]
		p := packet.Packet(bytes.Clone(tt.Payload))
		switch {
		case tt.Name == "junk_ttl2" || tt.Name == "legacy_beacon":
			if got := packet.Classify(p); got == packet.KindPacket || got == packet.KindFragment {
				t.Errorf("%s: taken for a packet", tt.Name)
			}
			continue
		case packet.Classify(p) == packet.KindFragment:
			checkFragment(t, list[i-1], tt)
			continue
		case p.Fragmented():
			continue // the fragment that follows is checked with it
		case p.Suite() == packet.SuiteTrusted:
			if fmt.Sprintf("%016x", p.TrustedPath()) != tt.TrustedPath || uint8(p.Verb()) != *tt.Verb || !bytes.Equal(p[packet.HeaderLen-1:], tt.Clear) {
				t.Errorf("%s: path %x, verb %v", tt.Name, p.TrustedPath(), p.Verb())
			}
			continue
		case k == nil || tt.Verb == nil:
			t.Errorf("%s: nothing is checked", tt.Name)
			continue
		}
		if err := k.Open(p, s); err != nil {
			if tt.Name != "error_identity_collision_wrong_key" {
				t.Errorf("%s: Open: %v", tt.Name, err)
			}
			continue
		}
		p, err := packet.Decompress(p, make([]byte, 0, packet.MaxPacket))
		if err != nil || uint8(p.Verb()) != *tt.Verb {
			t.Errorf("%s: verb %v, %v", tt.Name, p.Verb(), err)
			continue
		}
		if p.Verb() != packet.VerbHello && !bytes.Equal(p.Payload(), tt.Plain) {
			t.Errorf("%s: payload %x, want %x", tt.Name, p.Payload(), tt.Plain)
		}
		checkMessage(t, tt, k, p)
	}
}

// checkFragment joins a head and the fragment that was captured after it.
func checkFragment(t *testing.T, head, tail captured) {
	f, err := packet.ParseFragment(bytes.Clone(tail.Payload))
	if err != nil {
		t.Fatalf("%s: %v", tail.Name, err)
	}
	if want := tail.Fragment; !bytes.Equal(f.Data(), want.Payload) || f.Destination().String() != want.Dest || f.Hops() != want.Hops {
		t.Errorf("%s: %+v", tail.Name, f)
	}
	var r packet.Reassembler
	now, src := time.Unix(1, 0), netip.MustParseAddr("192.0.2.1")
	if _, whole := r.AddHead(now, src, packet.Packet(bytes.Clone(head.Payload)), nil); whole {
		t.Errorf("%s: complete without its fragment", head.Name)
	}
	got, whole := r.AddFragment(now, src, f, nil)
	want := append(bytes.Clone(head.Payload), f.Data()...)
	if whole {
		packet.Packet(want).SetFragmented(packet.Packet(got).Fragmented())
	}
	if !whole || !bytes.Equal(got, want) {
		t.Errorf("%s: reassembled %v, %d bytes", head.Name, whole, len(got))
	}
	if want := head.Reassembled.Hex; len(want) > 0 && !bytes.Equal(got[packet.HeaderLen:], want[packet.HeaderLen:]) {
		t.Errorf("%s: %d bytes, want %d", head.Name, len(got), len(want))
	}
}

func checkMessage(t *testing.T, tt captured, k *packet.Keys, p packet.Packet) {
	s := new(packet.Scratch)
	switch p.Verb() {
	case packet.VerbHello:
		var f struct {
			Timestamp       int64
			Identity        struct{ String string }
			SentTo          string      `json:"sent_to_physical_address"`
			PlanetTimestamp int64       `json:"planet_timestamp"`
			Plain           testvec.Hex `json:"encrypted_area_plain"`
			Moons           []struct{ Timestamp int64 }
		}
		if err := json.Unmarshal(tt.Fields, &f); err != nil {
			t.Fatal(err)
		}
		h, ok := parseHello(p.Payload())
		if !ok || h.timestamp != f.Timestamp || h.identity.String() != f.Identity.String || h.sentTo != apText(f.SentTo) || h.planetTimestamp != f.PlanetTimestamp {
			t.Errorf("%s: parsed %+v, %v", tt.Name, h, ok)
			return
		}
		k.MaskHello(p, h.masked, s)
		if !bytes.Equal(p[h.masked:], f.Plain) {
			t.Errorf("%s: unmasked %x, want %x", tt.Name, p[h.masked:], f.Plain)
		}
		if h.moons = parseMoons(p[h.masked:]); len(h.moons) != len(f.Moons) {
			t.Errorf("%s: moons %v", tt.Name, h.moons)
		}
		b := packet.Packet(h.append(make([]byte, packet.HeaderLen)))
		packet.PutHeader(b, p.ID(), p.Destination(), p.Source(), packet.VerbHello)
		k.MaskHello(b, h.masked, s)
		k.Seal(b, packet.SuitePoly1305, s)
		if p.Suite() == packet.SuitePoly1305 && !bytes.Equal(b, tt.Payload) {
			t.Errorf("%s: built %x, want %x", tt.Name, []byte(b), tt.Payload)
		}
	case packet.VerbOK:
		re, rest, ok := parseReply(p.Payload())
		if !ok || !bytes.Equal(append(re.append(nil), rest...), p.Payload()) {
			t.Errorf("%s: reply %+v", tt.Name, re)
		}
		if re.verb == packet.VerbHello {
			o, ok := parseOKHello(rest)
			if !ok || !bytes.Equal(o.append(nil), rest) {
				t.Errorf("%s: OK(HELLO) %+v does not survive", tt.Name, o)
			}
		}
	case packet.VerbRendezvous:
		v, ok := parseRendezvous(p.Payload())
		if !ok || !bytes.Equal(v.append(nil), p.Payload()) {
			t.Errorf("%s: %+v", tt.Name, v)
		}
	case packet.VerbPushDirectPaths:
		eps := parsePush(p.Payload())
		b, rest := appendPush(nil, eps)
		if len(rest) != 0 || !bytes.Equal(b, p.Payload()) {
			t.Errorf("%s: %v does not survive", tt.Name, eps)
		}
	}
}

func FuzzMessages(f *testing.F) {
	_, list := loadPackets(f)
	for _, tt := range list {
		f.Add([]byte(tt.Plain))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, ok := parseHello(b); ok && h.masked != 0 {
			parseMoons(b[min(len(b), h.masked-packet.HeaderLen):])
			if h.identity.Address() != identity.AddressFromBytes(b[13:]) {
				t.Error("identity read from the wrong place")
			}
		}
		if o, ok := parseOKHello(b); ok && len(o.worlds) > len(b) {
			t.Error("worlds longer than the packet")
		}
		if v, ok := parseRendezvous(b); ok && v.at.Port() == 0 {
			t.Error("port 0 accepted")
		}
		if eps := parsePush(b); len(eps) > maxPushed {
			t.Errorf("%d endpoints", len(eps))
		}
		parseReply(b)
	})
}

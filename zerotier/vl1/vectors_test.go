package vl1

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

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
	Fields json.RawMessage
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
	opened := 0
	for _, tt := range list {
		k := keys[tt.KeyOf]
		if k == nil || tt.Verb == nil || packet.Classify(tt.Payload) != packet.KindPacket {
			continue
		}
		p := packet.Packet(bytes.Clone(tt.Payload))
		if p.Fragmented() || p.Suite() == packet.SuiteTrusted {
			continue
		}
		if err := k.Open(p, s); err != nil {
			if tt.Name != "error_identity_collision_wrong_key" {
				t.Errorf("%s: Open: %v", tt.Name, err)
			}
			continue
		}
		opened++
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
	if opened < 30 {
		t.Errorf("opened only %d packets", opened)
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

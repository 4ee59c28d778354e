package vl2

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"ztgate/zerotier/internal/testvec"
)

type vecChunk struct {
	VerbName string      `json:"verb_name"`
	Verb     any         `json:"verb"` // a number or a name
	From     string      `json:"from"`
	Payload  testvec.Hex `json:"payload"`
}

// chunkBytes strips the reply fields of OK.
func (c *vecChunk) chunkBytes() []byte {
	if c.VerbName == "OK" || c.Verb == "OK" {
		return c.Payload[9:]
	}
	return c.Payload
}

type vecNetconf struct {
	Identities []vecNode `json:"identities"`
	SSO        []struct {
		Name    string     `json:"name"`
		Packets []vecChunk `json:"packets"`
		State   struct {
			AuthURL    string `json:"authentication_url"`
			CentralURL string `json:"central_auth_url"`
		} `json:"member_state"`
	} `json:"sso"`
	ChunkCases []struct {
		Name    string     `json:"name"`
		Network string     `json:"network_id"`
		Member  string     `json:"member"`
		Before  string     `json:"config_name_before"`
		After   string     `json:"config_name_after"`
		Packets []vecChunk `json:"packets"`
		MTU     int        `json:"mtu_after"`
	} `json:"chunk_cases"`
}

func TestChunkCases(t *testing.T) {
	var v vecNetconf
	testvec.Load(t, "netconf.json", &v)
	ids := identities(t, v.Identities)
	now := time.Unix(1760000000, 0)
	var a Assembler
	for _, c := range v.ChunkCases {
		want := c.After
		if strings.HasPrefix(c.Name, "legacy unsigned") {
			want = c.Before // refused here (chapter 03 §1.5)
		}
		name := c.Before
		for i := range c.Packets {
			chunk, err := ParseChunk(c.Packets[i].chunkBytes())
			if err != nil || !chunk.Verify(ids["ctrl"]) {
				continue
			}
			dict, _ := a.Add(now, chunk)
			if dict == nil {
				continue
			}
			cfg, err := DecodeNetworkConfig(dict)
			if err != nil || cfg.Member != ids[c.Member].Address() || cfg.ID != vecNetwork(t, c.Network) {
				continue
			}
			name = cfg.Name
			if c.MTU != 0 {
				wantEqual(t, c.Name+": MTU", cfg.MTU, c.MTU)
			}
		}
		wantEqual(t, c.Name, name, want)
		now = now.Add(time.Second)
	}
}

func TestAssemblerRefusals(t *testing.T) {
	now := time.Unix(1760000000, 0)
	chunk := func(update uint64, total, index int, data string) Chunk {
		sig := fmt.Appendf(nil, "%d %d %d %s", update, total, index, data)
		return Chunk{UpdateID: update, Total: total, Index: index, Data: []byte(data), Signature: append(sig, make([]byte, 96-len(sig))...)}
	}
	var a Assembler
	add := func(c Chunk, fresh bool, dict string) {
		t.Helper()
		d, f := a.Add(now, c)
		if f != fresh || string(d) != dict {
			t.Errorf("update %d, index %d: %q, %v; want %q, %v", c.UpdateID, c.Index, d, f, dict, fresh)
		}
	}
	add(chunk(1, 6, 0, "ab"), true, "")
	add(chunk(1, 6, 0, "ab"), false, "") // the same
	add(chunk(1, 6, 1, "bc"), false, "") // overlapping
	add(chunk(1, 7, 4, "ef"), false, "") // another total
	add(chunk(1, 6, 4, "ef"), true, "")  // leaves a hole
	add(chunk(1, 6, 2, "cd"), true, "abcdef")
	add(chunk(1, 6, 2, "cd"), false, "") // complete already
	add(chunk(1, 6, 2, "CD"), false, "") // complete already, other content
	for u := uint64(2); u < 7; u++ {     // more updates than slots
		add(chunk(u, 4, 0, "wx"), true, "")
	}
	add(chunk(6, 4, 2, "yz"), true, "wxyz")
	add(chunk(5, 4, 2, "yz"), true, "wxyz")
	now = now.Add(time.Hour)
	a.Expire(now)
	add(chunk(4, 4, 2, "yz"), true, "") // its other half is gone
}

func TestRefusalVectors(t *testing.T) {
	var v vecNetconf
	testvec.Load(t, "netconf.json", &v)
	for _, c := range v.SSO {
		for _, p := range c.Packets {
			if p.VerbName != "ERROR" {
				continue
			}
			data := p.Payload[18:]
			url := ParseLogin(data).URL()
			switch {
			case c.State.AuthURL != "":
				wantEqual(t, c.Name, url, c.State.AuthURL)
			case c.State.CentralURL == "":
				wantEqual(t, c.Name, url, "")
			case url == "":
				t.Errorf("%s: no login address", c.Name)
			}
		}
	}
}

func TestDictionary(t *testing.T) {
	tests := []struct {
		in, key, want string
	}{
		{"a=1\nb=2", "b", "2"},
		{"a=1\r\nb=2\r\n", "b", "2"},
		{"a=1\na=2", "a", "1"},
		{"a=\\0\\n\\r\\e\\\\\\x", "a", "\x00\n\r=\\x"},
		{"a=x\\", "a", "x"},
		{"a=b=c", "a", "b=c"},
		{"nonsense\na=1", "a", "1"},
		{"a=1\x00b=2", "b", ""},
		{"=x\na=1", "a", "1"},
	}
	for _, tt := range tests {
		if got := ParseDictionary([]byte(tt.in)).Text(tt.key); got != tt.want {
			t.Errorf("%q: %s = %q, want %q", tt.in, tt.key, got, tt.want)
		}
	}
	integers := map[string]uint64{
		"": 5, "0": 0, "ff": 255, "FFx": 255, "0x1f": 31, " +2": 2, "ffffffffffffffff": 1<<64 - 1, "1ffffffffffffffff": 1<<64 - 1, "zz": 0,
	}
	for in, want := range integers {
		d := Dictionary{"k": []byte(in)}
		wantEqual(t, "integer "+in, d.Integer("k", 5), want)
	}
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	w := &dictWriter{}
	w.blob("k", all)
	if !bytes.Equal(ParseDictionary(w.b)["k"], all) {
		t.Error("a blob does not survive")
	}
}

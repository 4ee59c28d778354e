package network_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/budget"
	"ztgate/zerotier/internal/testvec"
	"ztgate/zerotier/network"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
)

type vecMessage struct {
	From     string      `json:"from"`
	To       string      `json:"to"`
	Source   string      `json:"src"`
	Target   string      `json:"dst"`
	Verb     any         `json:"verb"`
	VerbName string      `json:"verb_name"`
	Payload  testvec.Hex `json:"payload"`
}

type vecNetconf struct {
	Identities []struct {
		Name   string `json:"name"`
		Secret string `json:"identity_secret"`
	} `json:"identities"`
	SSO []struct {
		Name    string       `json:"name"`
		Packets []vecMessage `json:"packets"`
		State   struct {
			Status   network.Status `json:"status"`
			Version  uint64         `json:"sso_version"`
			AuthURL  string         `json:"authentication_url"`
			Issuer   string         `json:"issuer_url"`
			Central  string         `json:"central_auth_url"`
			Nonce    string         `json:"nonce"`
			State    string         `json:"state"`
			ClientID string         `json:"client_id"`
			Provider string         `json:"provider"`
			Expiry   uint64         `json:"expiry"`
		} `json:"member_state"`
	} `json:"sso"`
	Errors []struct {
		Name    string       `json:"name"`
		Packets []vecMessage `json:"packets"`
	} `json:"errors"`
	Chunks []struct {
		Name    string       `json:"name"`
		Network string       `json:"network_id"`
		Before  string       `json:"config_name_before"`
		After   string       `json:"config_name_after"`
		MTU     int          `json:"mtu_after"`
		Packets []vecMessage `json:"packets"`
		Sent    []struct {
			To      string      `json:"to"`
			Verb    string      `json:"verb"`
			Payload testvec.Hex `json:"payload"`
		} `json:"sent_by_member"`
	} `json:"chunk_cases"`
}

// vectorBoard seats the nodes of netconf.json; none of them is a controller.
func vectorBoard(t *testing.T) (*board, map[string]*seat, vecNetconf) {
	var v vecNetconf
	testvec.Load(t, "netconf.json", &v)
	b := &board{t: t, now: time.UnixMilli(1_760_000_040_000), nodes: make(map[identity.Address]*seat), budget: budget.New(nil)}
	seats := make(map[string]*seat)
	for _, x := range v.Identities {
		id, err := identity.Parse(x.Secret)
		if err != nil {
			t.Fatal(err)
		}
		seats[x.Name] = b.sit(id, false)
	}
	return b, seats, v
}

// TestChunkCases gives a member the chunks that the reference got: it must take the
// same configurations, but none that is unsigned, and answer and forward alike.
func TestChunkCases(t *testing.T) {
	b, seats, v := vectorBoard(t)
	alice, bob := seats["alice"], seats["bob"]
	n, err := vl2.ParseNetworkID(v.Chunks[0].Network)
	if err != nil {
		t.Fatal(err)
	}
	if err := alice.layer.Join(nil, b.now, n, nil); err != nil {
		t.Fatal(err)
	}
	name := ""
	count := testvec.Count(t, "netconf.json", "chunk_cases")
	for _, c := range v.Chunks {
		count.Judge()
		refused := strings.HasPrefix(c.Name, "legacy unsigned")
		want := c.After
		if refused || name != c.Before && c.After == c.Before {
			want = name // an unsigned one before was refused too
		}
		b.queue = nil
		var sent []string
		for _, p := range c.Packets {
			verb := packet.VerbNetworkConfig
			if p.Verb == "OK" {
				verb = packet.VerbOK
			}
			seats[p.From].put(alice.address(), verb, p.Payload)
			q := b.queue[0]
			b.queue = nil
			alice.handle(q)
			for _, q := range b.queue {
				sent = append(sent, fmt.Sprintf("%s %s %x", q.to, q.p.Verb(), withoutID(q.p)))
			}
			b.queue = nil
		}
		name = ""
		if cfg := alice.config(n); cfg != nil {
			name = cfg.Name
			if c.MTU != 0 && cfg.MTU != c.MTU {
				t.Errorf("%s: MTU %d", c.Name, cfg.MTU)
			}
		}
		if name != want {
			t.Errorf("%s: the configuration is %q, want %q", c.Name, name, want)
		}
		var wantSent []string
		for _, x := range c.Sent {
			if !refused {
				wantSent = append(wantSent, fmt.Sprintf("%s %s %x", x.To, x.Verb, withoutID(append(make(packet.Packet, packet.HeaderLen), x.Payload...))))
			}
		}
		slices.Sort(sent)
		slices.Sort(wantSent)
		for i := range wantSent {
			wantSent[i] = strings.Replace(wantSent[i], "NETWORK_CONFIG", packet.VerbNetworkConfig.String(), 1)
		}
		if strings.Contains(c.Name, "fast propagation") && len(sent) == 1 {
			// Alice knows no member yet: the case needs Bob's record.
			t.Errorf("%s: not forwarded", c.Name)
		}
		if !slices.Equal(sent, wantSent) {
			t.Errorf("%s: sent %.300v, want %.300v", c.Name, sent, wantSent)
		}
		if c.Name == "dictionary version 6" { // Bob shows up before the next case
			bob.put(alice.address(), packet.VerbFrame, append(n.Append(nil), 8, 0, 1))
			b.settle()
		}
		b.now = b.now.Add(time.Second)
	}
}

// withoutID is a payload without the packet ID it answers to.
func withoutID(p packet.Packet) []byte {
	b := bytes.Clone(p.Payload())
	if len(b) == 25 && b[0] == byte(packet.VerbEcho) { // OK(ECHO) of a configuration
		clear(b[1:9])
	}
	return b
}

// TestRefusals gives members the controllers' refusals.
func TestRefusals(t *testing.T) {
	_, _, v := vectorBoard(t)
	count := testvec.Count(t, "netconf.json", "errors")
	for _, c := range v.Errors {
		count.Judge()
		b, seats, _ := vectorBoard(t)
		errors := 0
		for _, p := range c.Packets {
			if p.VerbName != "ERROR" || len(p.Payload) < 18 {
				continue
			}
			from, to := seatOf(t, b, p.Source), seatOf(t, b, p.Target)
			n := vl2.NetworkIDFromBytes(p.Payload[10:])
			if err := to.layer.Join(nil, b.now, n, nil); err != nil {
				t.Fatal(err)
			}
			for _, x := range seats { // from others it means nothing
				if x != from && x != to {
					x.put(to.address(), packet.VerbError, p.Payload)
				}
			}
			want := to.status(n)
			b.settleOnly(to)
			if got := to.status(n); got != want {
				t.Errorf("%s: %v by a refusal of somebody else", c.Name, got)
			}
			from.put(to.address(), packet.VerbError, p.Payload)
			b.settleOnly(to)
			want = network.StatusNotFound
			if packet.ErrorCode(p.Payload[9]) == packet.ErrorNetworkAccessDenied {
				want = network.StatusAccessDenied
			}
			if got := to.status(n); got != want {
				t.Errorf("%s: %v, want %v", c.Name, got, want)
			}
			errors++
		}
		if errors == 0 {
			t.Errorf("%s: no refusal in it", c.Name)
		}
	}
}

func seatOf(t *testing.T, b *board, address string) *seat {
	a, err := identity.ParseAddress(address)
	if err != nil || b.nodes[a] == nil {
		t.Fatalf("node %q: %v", address, err)
	}
	return b.nodes[a]
}

// settleOnly delivers what is under way to one node and drops the rest.
func (b *board) settleOnly(s *seat) {
	queue := b.queue
	b.queue = nil
	for _, q := range queue {
		if q.to == s.address() {
			s.handle(q)
		}
	}
	b.queue = nil
}

// TestSignOn gives a member what networks with single sign-on send.
func TestSignOn(t *testing.T) {
	count := testvec.Count(t, "netconf.json", "sso")
	for i := range 5 {
		count.Judge()
		b, seats, v := vectorBoard(t)
		c, alice := v.SSO[i], seats["alice"]
		var n vl2.NetworkID
		packets := c.Packets
		if len(packets) == 0 { // the data of this case is described only
			n = vecNetworks | 0x50
			data := "aV=0000000000000000\naU=" + strings.ReplaceAll(c.State.AuthURL, "=", `\e`)
			packets = []vecMessage{{VerbName: "ERROR", Payload: append(append(n.Append(append(make([]byte, 9), byte(packet.ErrorAuthenticationRequired))), 0, byte(len(data))), data...)}}
			packets[0].Payload[0] = byte(packet.VerbNetworkConfigRequest)
		}
		for _, p := range packets {
			verb := packet.VerbError
			switch p.VerbName {
			case "OK":
				n, verb = vl2.NetworkIDFromBytes(p.Payload[9:]), packet.VerbOK
			case "ERROR":
				n = vl2.NetworkIDFromBytes(p.Payload[10:])
			default:
				continue
			}
			if err := alice.layer.Join(nil, b.now, n, nil); err != nil {
				t.Fatal(err)
			}
			seats["ctrl"].put(alice.address(), verb, p.Payload)
			b.settleOnly(alice)
		}
		s, ok := alice.layer.Network(n)
		x, got := c.State, s.SSO
		if want := (vl2.SSO{Version: x.Version, Enabled: true, AuthURL: x.AuthURL, Expiry: x.Expiry, IssuerURL: x.Issuer, CentralURL: x.Central,
			Nonce: x.Nonce, State: x.State, ClientID: x.ClientID, Provider: x.Provider}); !ok || s.Status != x.Status || got != want && (s.Status != network.StatusOK || got.URL() != want.URL() || got.Expiry != want.Expiry || got.ClientID != want.ClientID) {
			t.Errorf("%s: %v %+v, want %v %+v", c.Name, s.Status, got, x.Status, want)
		}
		if s.AuthURL != got.URL() {
			t.Errorf("%s: shown %q", c.Name, s.AuthURL)
		}
	}
}

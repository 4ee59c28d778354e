package network_test

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/testvec"
	"ztgate/zerotier/network"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/simnet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

type vecFrame struct {
	Source      string      `json:"src_mac"`
	Destination string      `json:"dst_mac"`
	EtherType   uint16      `json:"ethertype"`
	Payload     testvec.Hex `json:"payload"`
}

func (f vecFrame) String() string {
	return fmt.Sprintf("%s%s%04x%x", f.Destination, f.Source, f.EtherType, []byte(f.Payload))
}

type vecPackets struct {
	Identities []struct {
		Name     string `json:"name"`
		Secret   string `json:"identity_secret"`
		Endpoint string `json:"endpoint"`
		Port     uint16 `json:"endpoint_port"`
	} `json:"identities"`
	Groups []struct {
		Label     string                `json:"label"`
		Delivered map[string][]vecFrame `json:"delivered_frames"`
	} `json:"groups"`
	Cases []struct {
		Name       string      `json:"name"`
		Verb       uint8       `json:"verb_number"`
		From       string      `json:"from"`
		To         string      `json:"to"`
		Payload    testvec.Hex `json:"payload"`
		Delivered  []vecFrame  `json:"delivered"`
		Registered []bool      `json:"registered"`
		Member     *bool       `json:"sender_still_member_of_group"`
		Replies    []struct {
			Verb    string      `json:"verb"`
			Payload testvec.Hex `json:"payload"`
		} `json:"replies"`
	} `json:"frame_cases"`
}

// world is the nodes of the vectors on a virtual internet.
type world struct {
	t     *testing.T
	net   *simnet.Net
	hosts map[string]*host
	vec   vecPackets
}

const vecNetworks = vl2.NetworkID(0x48ccec18eb000000)

func newWorld(t *testing.T, config func(w *world, c *vl2.NetworkConfig)) *world {
	w := &world{t: t, net: simnet.New(), hosts: make(map[string]*host)}
	w.net.Now = time.UnixMilli(0x199c82d8544) // when the captured certificates were made
	testvec.Load(t, "vl2-packets.json", &w.vec)
	ids := make(map[string]*identity.Identity)
	for _, x := range w.vec.Identities {
		id, err := identity.Parse(x.Secret)
		if err != nil {
			t.Fatal(err)
		}
		ids[x.Name] = id
	}
	planet := &vl1.World{ID: 1, Timestamp: 1, Roots: []vl1.Root{{Identity: ids["root"].Public(), Endpoints: []netip.AddrPort{ap("203.0.113.1:9993")}}}}
	ctl := &authority{n: vecNetworks, authorized: make(map[identity.Address]bool), members: make(map[identity.Address]bool)}
	ctl.config = func(c *vl2.NetworkConfig) { config(w, c) }
	for i, name := range []string{"root", "ctrl", "alice", "bob", "carol", "dave"} {
		var a *authority
		if name == "ctrl" {
			a = ctl
		}
		ctl.authorized[ids[name].Address()] = true
		w.hosts[name] = newHost(t, w.net, ids[name], planet, a, netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i + 1)}), 9993))
	}
	return w
}

func (w *world) addr(name string) identity.Address { return w.hosts[name].id.Address() }

func (w *world) mac(n vl2.NetworkID, name string) vl2.MAC { return vl2.MACOf(n, w.addr(name)) }

// join lets nodes join and make acquaintance, so that all paths are direct.
func (w *world) join(n vl2.NetworkID, names ...string) {
	w.t.Helper()
	for _, name := range names {
		w.hosts[name].join(w.t, w.net, n)
	}
	ok := func() bool {
		return !slices.ContainsFunc(names, func(name string) bool { return w.hosts[name].status(n) != network.StatusOK })
	}
	if !w.net.RunUntil(10*time.Second, ok) {
		w.t.Fatal("not up after 10 s")
	}
	for range 3 {
		for _, a := range names {
			for _, b := range names {
				if a != b {
					w.hosts[a].write(w.net, n, w.mac(n, b), 0x88b4, []byte("acquaint"))
				}
			}
		}
		w.net.Run(5 * time.Second)
	}
	w.clear()
}

func (w *world) clear() {
	for _, h := range w.hosts {
		h.got, h.peers.replies = nil, nil
	}
}

func (h *host) frames() (out []string) {
	for _, f := range h.got {
		out = append(out, hex.EncodeToString(f))
	}
	slices.Sort(out)
	return out
}

func wanted(list []vecFrame) (out []string) {
	for _, f := range list {
		out = append(out, f.String())
	}
	slices.Sort(out)
	return out
}

func bridgeConfig(w *world, c *vl2.NetworkConfig) {
	c.Addresses = nil
	if c.ID == vecNetworks|0x60 {
		c.Specialists = []vl2.Specialist{{Address: w.addr("alice"), Roles: vl2.RoleBridge}, {Address: w.addr("dave"), Roles: vl2.RoleBridge}}
	}
}

// TestFrameCases does what the reference did with hand-made packets, but where
// chapter 03 says to be stricter.
func TestFrameCases(t *testing.T) {
	stricter := map[string]bool{
		"larger than the network MTU":                     true, // dropped before the port (§8)
		"MULTICAST_LIKE of a unicast MAC is stored as is": true, // refused (§8)
	}
	w := newWorld(t, func(w *world, c *vl2.NetworkConfig) {
		bridgeConfig(w, c)
		c.Flags = 0 // nobody announces the broadcast group
	})
	const n = vecNetworks | 0x60
	w.join(n, "alice", "bob", "carol", "dave")
	broadcast := vl2.MulticastGroup{MAC: vl2.BroadcastMAC}.Append(n.Append(nil))
	like := func(from string, to ...string) {
		for _, x := range to {
			h := w.hosts[from]
			h.core.Send(h.tx.Begin(h.port, w.net.Now), w.addr(x), packet.VerbMulticastLike, broadcast, vl1.SendOpts{})
		}
		w.net.Run(time.Second)
	}
	like("alice", "carol", "root", "ctrl")
	like("bob", "carol")
	// gathered reports whether a node lists another in a group.
	gathered := func(at, of string, group []byte) bool {
		w.clear()
		h := w.hosts["dave"]
		q := append(n.Append(nil), 0)
		q = append(append(q, group...), 0, 0, 0, 99)
		h.core.Send(h.tx.Begin(h.port, w.net.Now), w.addr(at), packet.VerbMulticastGather, q, vl1.SendOpts{})
		w.net.Run(time.Second)
		return strings.Contains(strings.Join(w.hosts[at].peers.replies, " ")+" ", w.addr(of).String())
	}
	count := testvec.Count(t, "vl2-packets.json", "frame_cases")
	for _, c := range w.vec.Cases {
		count.Judge()
		w.clear()
		from, to := w.hosts[c.From], w.hosts[c.To]
		from.core.Send(from.tx.Begin(from.port, w.net.Now), w.addr(c.To), packet.Verb(c.Verb), c.Payload, vl1.SendOpts{})
		w.net.Run(2 * time.Second)
		got, want := to.frames(), wanted(c.Delivered)
		replies := slices.Clone(to.peers.replies)
		if stricter[c.Name] {
			if len(got) != 0 {
				t.Errorf("%s: delivered", c.Name)
			}
		} else if !slices.Equal(got, want) {
			t.Errorf("%s: delivered %v, want %v", c.Name, got, want)
		}
		var wantReplies []string
		for _, r := range c.Replies {
			wantReplies = append(wantReplies, fmt.Sprintf("%s %02x %x", r.Verb, r.Payload[0], []byte(r.Payload[9:])))
		}
		if !slices.Equal(replies, wantReplies) {
			t.Errorf("%s: replied %v, want %v", c.Name, replies, wantReplies)
		}
		for i, want := range c.Registered {
			if got := gathered(c.To, c.From, c.Payload[18*i+8:18*i+18]); got != (want && !stricter[c.Name]) {
				t.Errorf("%s: entry %d registered %v", c.Name, i, got)
			}
		}
		if c.Member != nil && gathered(c.To, c.From, broadcast[8:]) != *c.Member {
			t.Errorf("%s: still a member %v", c.Name, !*c.Member)
		}
	}
}

// testScenesOfFrames repeats what was done with the reference and compares the
// frames that every node's port got.
func testScenesOfFrames(t *testing.T, count *testvec.Tally) {
	w := newWorld(t, func(w *world, c *vl2.NetworkConfig) {
		bridgeConfig(w, c)
		field := func(length byte) []byte {
			return append(w.addr("carol").Append([]byte{0, 0, 0}), 0, 0, 0, 0, 0, length)
		}
		switch c.ID {
		case vecNetworks | 0x61:
			c.Specialists = []vl2.Specialist{{Address: w.addr("carol"), Roles: vl2.RoleReplicator}}
		case vecNetworks | 0x63:
			c.Specialists = []vl2.Specialist{{Address: w.addr("carol"), Roles: vl2.RoleReplicator | vl2.RoleBridge}}
		case vecNetworks | 0x62:
			c.Rules = nil
			for i, action := range []uint8{vl2.ActionWatch, vl2.ActionTee, vl2.ActionRedirect} {
				length := byte(0)
				if action == vl2.ActionWatch {
					length = 16
				}
				c.Rules = append(c.Rules, vl2.Rule{Type: vl2.MatchEtherType, Field: []byte{0x88, 0xb5 + byte(i)}}, vl2.Rule{Type: action, Field: field(length)})
			}
			c.Rules = append(c.Rules, vl2.Rule{Type: vl2.ActionAccept})
		}
	})
	payload := append([]byte{0xde, 0xad, 0xbe, 0xef}, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
	twice := append(slices.Clone(payload), payload...)
	behind := func(i byte) vl2.MAC { return vl2.MAC{0x00, 0x50, 0xc2, 0xaa, 0xbb, i} }
	const et = 0x88b5
	warmUp := func() {
		for _, x := range [][2]string{{"alice", "bob"}, {"bob", "alice"}, {"bob", "dave"}, {"dave", "bob"}, {"alice", "dave"}, {"dave", "alice"}} {
			w.hosts[x[0]].write(w.net, vecNetworks|0x60, w.mac(vecNetworks|0x60, x[1]), et, payload)
		}
	}
	w.join(vecNetworks|0x60, "alice", "bob", "dave")
	for _, x := range []vl2.NetworkID{0x61, 0x63, 0x62} {
		w.join(vecNetworks|x, "alice", "bob", "carol", "dave")
	}
	write := func(from string, n vl2.NetworkID, src, dst vl2.MAC, etherType uint16, data []byte) func() {
		return func() { w.hosts[from].writeFrom(w.net, vecNetworks|n, src, dst, etherType, data) }
	}
	mac := func(n vl2.NetworkID, name string) vl2.MAC { return w.mac(vecNetworks|n, name) }
	for _, s := range []struct {
		label string
		do    func()
	}{
		{"bridge network: plain unicast between members", warmUp},
		{"active bridge sends a frame from a MAC behind it to bob", write("alice", 0x60, behind(1), mac(0x60, "bob"), et, payload)},
		{"bob answers the bridged MAC", write("bob", 0x60, mac(0x60, "bob"), behind(1), et, payload)},
		{"bob sends to an unknown MAC", write("bob", 0x60, mac(0x60, "bob"), behind(2), et, payload)},
		{"carol is not a bridge", write("carol", 0x61, behind(3), mac(0x61, "bob"), et, payload)},
		{"active bridge sends a broadcast", write("alice", 0x60, behind(1), vl2.BroadcastMAC, et, payload)},
		{"bob broadcasts", write("bob", 0x60, mac(0x60, "bob"), vl2.BroadcastMAC, et, payload)},
		{"network with a multicast replicator that is not a bridge", write("alice", 0x61, mac(0x61, "alice"), vl2.BroadcastMAC, et, payload)},
		{"replicator that is also an active bridge", write("alice", 0x63, mac(0x63, "alice"), vl2.BroadcastMAC, et, payload)},
		{"WATCH", write("alice", 0x62, mac(0x62, "alice"), mac(0x62, "bob"), et, twice)},
		{"TEE on both sides", write("alice", 0x62, mac(0x62, "alice"), mac(0x62, "bob"), et+1, twice)},
		{"REDIRECT", write("alice", 0x62, mac(0x62, "alice"), mac(0x62, "bob"), et+2, twice)},
	} {
		count.Judge()
		i := slices.IndexFunc(w.vec.Groups, func(g struct {
			Label     string                `json:"label"`
			Delivered map[string][]vecFrame `json:"delivered_frames"`
		}) bool {
			return strings.HasPrefix(g.Label, s.label)
		})
		if i < 0 {
			t.Fatalf("no scene %q", s.label)
		}
		w.clear()
		s.do()
		w.net.Run(4 * time.Second)
		for name, h := range w.hosts {
			if got, want := h.frames(), wanted(w.vec.Groups[i].Delivered[name]); !slices.Equal(got, want) {
				t.Errorf("%s: %s got %v, want %v", s.label, name, got, want)
			}
		}
	}
}

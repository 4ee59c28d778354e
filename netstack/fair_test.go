package netstack

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
)

// spray sends n packets from the VPC in batches, and forgets what comes out.
func (r *rig) spray(side Side, n int, packet func(i int) []byte) {
	for i := 0; i < n; i += 100 {
		var batch [][]byte
		for j := i; j < min(n, i+100); j++ {
			batch = append(batch, packet(j))
		}
		if side == VPCSide {
			r.feed(batch, nil)
		} else {
			r.feed(nil, batch)
		}
		r.takeRaw()
	}
}

// connect opens a connection from a VPC client, with a pause of 50 ms before the answer,
// and something else meanwhile.
func (r *rig) connect(client, server string, meanwhile func()) {
	r.t.Helper()
	o, v := r.fromVPC(pkttest.TCP(client, server, ipkt.SYN, 100, 0, ""))
	if len(o) != 1 {
		r.t.Fatalf("%s is refused: %q", client, v)
	}
	outside := strings.Fields(o[0])[1]
	r.now = r.now.Add(50 * time.Millisecond)
	meanwhile()
	if _, v = r.fromOverlay(pkttest.TCP(server, outside, ipkt.SYN|ipkt.ACK, 500, 101, "")); len(v) != 1 {
		r.t.Fatalf("the answer to %s doesn't come through", client)
	}
	if o, _ = r.fromVPC(pkttest.TCP(client, server, ipkt.ACK, 101, 501, "")); len(o) != 1 {
		r.t.Fatalf("the connection of %s is gone", client)
	}
}

// TestFairShares floods the engine, from the VPC and from an overlay member through a
// forward: others open a connection each tenth of a second, at once, and those they
// have go on.
func TestFairShares(t *testing.T) {
	const server = "10.0.0.10:80"
	for name, tt := range map[string]struct {
		side   Side
		packet func(i int) []byte
	}{
		"SYN": {VPCSide, func(i int) []byte {
			return pkttest.TCP(fmt.Sprintf("172.31.0.10:%d", 1024+i%60000), server, ipkt.SYN, 1, 0, "")
		}},
		"UDP, forged": {VPCSide, func(i int) []byte {
			return pkttest.UDP(fmt.Sprintf("172.31.%d.%d:%d", i*7%256, 2+i*13%250, 1024+i%60000), server, "x")
		}},
		"SYN, forged": {VPCSide, func(i int) []byte {
			return pkttest.TCP(fmt.Sprintf("172.31.%d.%d:%d", i*7%256, 2+i*13%250, 1024+i%60000), server, ipkt.SYN, 1, 0, "")
		}},
		"member": {OverlaySide, func(i int) []byte {
			return pkttest.TCP(fmt.Sprintf("10.9.%d.%d:%d", i/250%250, 1+i%250, 1024+i%60000), "10.0.0.1:443", ipkt.SYN, 1, 0, "")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(c *Config) {
				c.NAT = NAT{Seed: [32]byte{1}, MaxFlows: 64000}
				c.Forwards = []PortForward{forward(OverlaySide, ipkt.TCP, "0.0.0.0:443", "172.31.0.20:443", true)}
			})
			r.connect("172.31.3.3:4000", server, func() {})
			n := 0
			next := func(int) []byte { n++; return tt.packet(n) }
			r.spray(tt.side, 64500, next)
			for i := range 20 {
				r.sleep(50 * time.Millisecond)
				r.connect(fmt.Sprintf("172.31.3.4:%d", 20000+i), server, func() { r.spray(tt.side, 1000, next) })
			}
			if o, _ := r.fromVPC(pkttest.TCP("172.31.3.3:4000", server, ipkt.ACK, 101, 501, "x")); len(o) != 1 {
				t.Error("an established connection is gone")
			}
			r.account()
			clients, networks := r.e.Greedy(3)
			if len(clients) != 3 && name != "SYN" || clients[0].Flows < clients[len(clients)-1].Flows {
				t.Errorf("the greediest are %+v", clients)
			}
			switch name {
			case "SYN":
				if g := clients[0]; g.Prefix.Addr() != netip.MustParseAddr("172.31.0.10") || g.HalfOpen < 30000 || g.Ports < 30000 || g.Evicted == 0 {
					t.Errorf("the greediest is %+v", g)
				}
			default:
				if g := networks[0]; g.Prefix.Bits() != 24 || g.HalfOpen < 100 || g.Clients < 100 {
					t.Errorf("the greediest network is %+v", g)
				}
			}
		})
	}
}

// TestFairSharesAreTold: who has its share of ports with established flows is told so, by
// the error that TCP takes as temporary, and the refusal is counted for it.
func TestFairSharesAreTold(t *testing.T) {
	r := newRig(t)
	var told []string
	for i := range 50000 {
		client := fmt.Sprintf("172.31.0.10:%d", 1024+i)
		o, v := r.fromVPC(pkttest.UDP(client, "10.0.0.10:53", "x"))
		if len(o) == 0 {
			told = append(told, v...)
			continue
		}
		r.fromOverlay(pkttest.UDP("10.0.0.10:53", strings.Fields(o[0])[1], "y"))
		r.fromVPC(pkttest.UDP(client, "10.0.0.10:53", "x"))
	}
	if len(told) == 0 || !strings.HasPrefix(told[0], "icmp 3/1 172.31.0.1 > 172.31.0.10") {
		t.Errorf("told %q", told[:min(len(told), 1)])
	}
	if n := r.drops(VPCSide, dropClientLimit); n == 0 {
		t.Error("nothing is counted")
	}
	if c, _ := r.e.Greedy(1); len(c) != 1 || c[0].Refused == 0 || c[0].Ports != 61512*3/4 {
		t.Errorf("the greediest is %+v", c)
	}
	r.connect("172.31.0.11:4000", "10.0.0.10:80", func() {})
}

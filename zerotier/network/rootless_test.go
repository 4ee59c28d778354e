package network_test

import (
	"testing"
	"time"

	"ztgate/zerotier/network"
	"ztgate/zerotier/vl2"
)

// The root, which is the controller too, is killed with members in place: they keep
// talking, also one that is started anew from what it kept, until the root is back.
func TestRootKilled(t *testing.T) {
	for phase := time.Duration(0); phase < time.Minute; phase += 19 * time.Second { // of what is done once a minute
		t.Run(phase.String(), func(t *testing.T) { testRootKilled(t, phase) })
	}
}

func testRootKilled(t *testing.T, phase time.Duration) {
	n, r, a, b, id := up(t)
	n.Run(2 * time.Second)
	talk(n, a, b, id)
	n.Run(10 * time.Second)
	planet, sock := a.core.Planet(), r.port.Endpoints()[0]
	n.Detach(r.port)
	minutes := 5
	if phase == 0 { // longer than certificates may differ
		minutes = 60
	}
	for range minutes / 5 {
		if x, y := talk(n, a, b, id); !x || !y {
			t.Fatalf("without the root: %v %v", x, y)
		}
		n.Run(5 * time.Minute)
	}
	// A starts anew with its identity, its configuration and its peers.
	s, _ := a.layer.Network(id)
	kept, at := a.core.PeerRecords(), a.port.Endpoints()[0]
	n.Detach(a.port)
	n.Run(20*time.Second + phase)
	a = newHostFromCache(t, n, a.id, planet, nil, at, kept)
	if err := a.layer.Join(a.port, n.Now, id, s.Config); err != nil {
		t.Fatal(err)
	}
	// Its host has forgotten who has B's address.
	request := arp(a, id, ipOf(b.id.Address()))
	start := n.Now
	if !n.RunUntil(30*time.Second, func() bool {
		a.write(n, id, vl2.BroadcastMAC, vl2.EtherTypeARP, request)
		n.Run(time.Second)
		return b.count(request) > 0
	}) {
		t.Fatal("B doesn't get A's request")
	}
	t.Logf("B got A's request after %v", n.Now.Sub(start))
	if x, y := talk(n, a, b, id); !x || !y {
		t.Errorf("after A's restart: %v %v", x, y)
	}
	if !a.direct(b) || a.core.Online() {
		t.Error("not in direct contact, or online without a root")
	}
	// The root comes back, with nothing but its identity and the controller's records. The
	// members don't renew their certificates at the same moment.
	ctl := &authority{n: id, authorized: r.ctl.authorized, members: r.ctl.members}
	newHost(t, n, r.id, planet, ctl, sock)
	renewed := func(h *host) bool {
		x, _ := h.layer.Network(id)
		return h.core.Online() && x.Status == network.StatusOK && x.Config.Timestamp > s.Config.Timestamp
	}
	if !n.RunUntil(30*time.Second, func() bool { return renewed(a) && renewed(b) }) {
		t.Error("no new configurations after the root came back")
	}
	talk(n, a, b, id)
	if x, y := talk(n, a, b, id); !x || !y {
		t.Errorf("after the root came back: %v %v", x, y)
	}
}

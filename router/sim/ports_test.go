package sim

import (
	"net/netip"
	"testing"
	"testing/cryptotest"
	"time"

	"golang.org/x/sys/unix"
)

// Two clients behind one port are found, but not by a packet that was under way when the
// gateway lost its ports, also if it came by a root over two slow links.
func TestPortsUnderWay(t *testing.T) {
	const slow = 2 * slowestLink * time.Second
	for name, tt := range map[string]struct {
		lost          bool
		first, second time.Duration // when the two are heard
		found         bool
	}{
		"nothing lost":                        {false, 0, 8 * time.Second, true},
		"sent before":                         {true, 0, 8 * time.Second, false},
		"by a link at its slowest":            {true, slow / 2, 8 * time.Second, false},
		"by a root":                           {true, slow + 40*time.Millisecond, 8 * time.Second, false},
		"both of the run after":               {true, underWay, 8 * time.Second, true},
		"nothing lost, and later than a port": {false, 0, shareWindow, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSetting(t)
			cryptotest.SetGlobalRandom(t, 1)
			w := newWorld(1, s.ids, s.configs)
			begin, svc := w.net.Now, w.offices[0].svc
			if tt.lost {
				w.losePorts()
			}
			for i, at := range []time.Duration{tt.first, tt.second} {
				client := netip.AddrPortFrom(w.clients[i].addr, 20015)
				w.net.Now = begin.Add(at)
				svc.hear(&packet{proto: unix.IPPROTO_ICMP, src: netip.MustParseAddrPort("10.0.0.1:20015"), dst: netip.AddrPortFrom(officeAddr, 0),
					payload: token(clientMark, client, i)})
			}
			if found := len(w.findings) > 0; found != tt.found {
				t.Errorf("found %v", w.findings)
			}
		})
	}
}

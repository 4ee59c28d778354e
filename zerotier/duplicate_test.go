package zerotier

import (
	"bytes"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/simnet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/ztnode"
)

// site is roots, a controller, and nodes with their homes, on a virtual internet.
type site struct {
	t       *testing.T
	net     *simnet.Net
	secrets []string
	planet  []byte
	network ztnode.NetworkID

	ctl     *machine
	ctlHome string
}

// machine is a node of a site.
type machine struct {
	*Stepped
	port *simnet.Port
}

// Receive implements [simnet.Node].
func (m *machine) Receive(_ vl1.Out, _ time.Time, sock vl1.SocketID, from netip.AddrPort, d []byte) {
	m.Stepped.Receive(sock, from, d)
}

// Tick implements [simnet.Node].
func (m *machine) Tick(vl1.Out, time.Time) time.Time { return m.Stepped.Tick() }

var (
	siteRoots   = []string{"5.0.0.1:9993", "5.0.0.2:9993"}
	siteControl = "5.0.0.3:9993"
)

// newSite makes a site of two roots, and a controller that is the first of them if it
// should.
func newSite(t *testing.T, atRoot bool) *site {
	s := &site{t: t, net: simnet.New(), secrets: secrets(t)}
	var roots []vl1.Root
	for i, at := range siteRoots {
		id, err := identity.Parse(s.secrets[i])
		if err != nil {
			t.Fatal(err)
		}
		roots = append(roots, vl1.Root{Identity: id.Public(), Endpoints: []netip.AddrPort{netip.MustParseAddrPort(at)}})
	}
	s.planet = vl1.NewPlanet(1, 1, roots, vl1.Key{}).Append(nil)
	s.start(s.home(1), false, siteRoots[1])
	if atRoot {
		s.ctlHome = s.home(0)
		s.ctl = s.start(s.ctlHome, true, siteRoots[0])
	} else {
		s.start(s.home(0), false, siteRoots[0])
		s.ctlHome = s.home(2)
		s.ctl = s.start(s.ctlHome, true, siteControl)
	}
	rec := controller.DefaultNetwork()
	rec.Private = false
	rec.V4AssignMode.ZT = true
	rec.Routes = []controller.Route{{Target: netip.MustParsePrefix("10.9.0.0/16")}}
	rec.IPAssignmentPools = []controller.Pool{{Start: netip.MustParseAddr("10.9.0.1"), End: netip.MustParseAddr("10.9.255.250")}}
	n, err := s.ctl.Controller().CreateNetwork(rec)
	if err != nil {
		t.Fatal(err)
	}
	s.network = n.ID
	return s
}

// home makes a home with one of the identities.
func (s *site) home(secret int) string {
	dir := s.t.TempDir()
	write(s.t, filepath.Join(dir, "identity.secret"), s.secrets[secret], 0o600)
	return dir
}

// start starts a node.
func (s *site) start(home string, control bool, at string) *machine {
	s.t.Helper()
	m := &machine{}
	m.port = s.net.Attach(m, netip.MustParseAddrPort(at))
	n, err := NewStepped(Config{Home: home, Now: func() time.Time { return s.net.Now }, Planet: s.planet, Controller: control}, m.port)
	if err != nil {
		s.t.Fatal(err)
	}
	m.Stepped = n
	s.t.Cleanup(func() { _ = n.Close() })
	return m
}

// join starts a node that joins the network.
func (s *site) join(home, at string) *machine {
	s.t.Helper()
	m := s.start(home, false, at)
	if err := m.Join(s.network); err != nil {
		s.t.Fatal(err)
	}
	return m
}

// stop ends a node.
func (s *site) stop(m *machine) {
	s.net.Detach(m.port)
	if err := m.Close(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) of(m *machine) ztnode.Network {
	n, _ := m.Network(s.network)
	return n
}

// A node notices that another one has its identity by answers to what it never asked. Which
// of the two gets them is up to others; the other one hears nothing from the controller
// but, if it is a root, that it is there.
func TestDuplicate(t *testing.T) {
	t.Parallel()
	for name, atRoot := range map[string]bool{"apart": false, "at a root": true} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, atRoot)
			home := s.home(4)
			a := s.join(home, "8.0.0.1:9993")
			s.net.Run(2 * time.Minute)
			if n := s.of(a); n.Status != ztnode.StatusOK || !n.Duplicate.IsZero() {
				t.Fatalf("before there is another: %+v", n)
			}
			b := s.join(s.home(4), "9.0.0.1:9993")
			if !s.net.RunUntil(time.Minute, func() bool { return !s.of(a).Duplicate.IsZero() || !s.of(b).Duplicate.IsZero() }) {
				t.Fatal("nobody noticed in a minute")
			}
			s.net.Run(time.Minute)
			for _, m := range []*machine{a, b} {
				if n := s.of(m); n.Duplicate.IsZero() && n.Unanswered < 8 {
					t.Errorf("%s: hears from the controller and notices nothing: %+v", m.port.Endpoints(), n)
				}
			}
			s.stop(b)
			s.net.Run(6 * time.Minute)
			if n := s.of(a); n.Status != ztnode.StatusOK || !n.Duplicate.IsZero() || n.Unanswered > 0 {
				t.Errorf("after the other one went: %+v", n)
			}
		})
	}
}

// What happens to a node that is the only one, or is done to it, is never taken for another.
func TestNoDuplicate(t *testing.T) {
	t.Parallel()
	for name, happens := range map[string]func(s *site, home string, m *machine) *machine{
		"it starts anew, again and again": func(s *site, home string, m *machine) *machine {
			for i := range 10 {
				s.net.Run(time.Duration(i) * 7 * time.Millisecond) // answers are under way
				s.stop(m)
				m = s.join(home, "8.0.0.1:9993")
				s.net.Run(time.Duration(i+1) * 700 * time.Millisecond)
			}
			return m
		},
		"it starts anew elsewhere, with an empty home": func(s *site, _ string, m *machine) *machine {
			s.stop(m)
			return s.join(s.home(4), "9.0.0.1:9993")
		},
		"it roams between two places": func(s *site, _ string, m *machine) *machine {
			for i := range 10 {
				s.net.Move(m.port, nil, netip.MustParseAddrPort([]string{"8.0.0.1:9993", "9.0.0.1:9993"}[i%2]))
				s.net.Run(time.Duration(i+1) * 5 * time.Second)
			}
			return m
		},
		"roots fail over": func(s *site, _ string, m *machine) *machine {
			for i := range 6 {
				down := netip.MustParseAddrPort(siteRoots[i%2])
				s.net.Drop = func(from, to netip.AddrPort, _ []byte) bool { return from == down || to == down }
				s.net.Run(70 * time.Second)
			}
			s.net.Drop = nil
			return m
		},
		"the controller starts anew": func(s *site, _ string, m *machine) *machine {
			for range 5 {
				s.stop(s.ctl)
				s.net.Run(80 * time.Second)
				s.ctl = s.start(s.ctlHome, true, siteControl)
				s.net.Run(20 * time.Second)
			}
			return m
		},
		"answers come late": func(s *site, _ string, m *machine) *machine {
			late := netip.MustParseAddrPort("8.0.0.1:9993")
			s.net.Delay = func(_, to netip.AddrPort, _ []byte) time.Duration {
				if to == late {
					return 25 * time.Second
				}
				return 0
			}
			s.net.Run(10 * time.Minute)
			s.net.Delay = nil
			return m
		},
		"old answers are sent again": func(s *site, home string, m *machine) *machine {
			at := netip.MustParseAddrPort("8.0.0.1:9993")
			var captured [][]byte
			s.net.Seen = func(_, to netip.AddrPort, d []byte) {
				if to == at {
					captured = append(captured, bytes.Clone(d))
				}
			}
			s.net.Run(10 * time.Minute)
			again := func() {
				s.net.Seen = nil
				for i, d := range captured {
					s.net.Inject(netip.MustParseAddrPort(siteControl), at, d)
					if i%20 == 0 {
						s.net.Run(time.Second)
					}
				}
			}
			again()
			s.stop(m)
			m = s.join(home, "8.0.0.1:9993")
			again() // while it starts
			s.net.Run(2 * time.Minute)
			again()
			return m
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, false)
			home := s.home(4)
			m := s.join(home, "8.0.0.1:9993")
			seen := 0
			watched := &m
			s.net.Run(2 * time.Minute)
			var watch func()
			watch = func() {
				if !s.of(*watched).Duplicate.IsZero() {
					seen++
				}
				s.net.After(100*time.Millisecond, watch)
			}
			watch()
			m = happens(s, home, m)
			s.net.Run(3 * time.Minute)
			if n := s.of(m); seen > 0 || n.Status != ztnode.StatusOK || !n.Duplicate.IsZero() {
				t.Errorf("another one was seen %d times: %+v", seen, n)
			}
		})
	}
}

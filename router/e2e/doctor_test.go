//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/internal/testwait"
	"ztgate/router/control"
	"ztgate/router/lab"
)

// doctor runs the command on the gateway's host.
func doctor(t *testing.T, s *lab.Scenario, args ...string) (d control.Diagnosis, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	began := time.Now()
	var out []byte
	err := s.Gateway.Do(func() (err error) {
		c := s.Gateway.Command(ctx, options(t).Binary, append([]string{"doctor", "-j", "--home", s.GatewayProcess.Home}, args...)...)
		c.Env = []string{"HOME=/root"} // nothing of ours
		out, err = c.Output()
		return err
	})
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		code = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("doctor took %v", took)
	}
	if err := json.Unmarshal(out, &d); err != nil {
		t.Fatalf("exit code %d, %v: %s", code, err, out)
	}
	return d, code
}

// TestDoctor breaks one link after the other.
func TestDoctor(t *testing.T) {
	s := start(t, options(t))
	sysctl := func(key, value string) error { return s.Gateway.Sysctl(key, value) }
	ip := func(n *lab.Namespace, args string) error {
		_, err := n.Run(t.Context(), "ip", strings.Fields(args)...)
		return err
	}
	drop := func(n *lab.Namespace, hook, rule string) error {
		_, err := n.Input(t.Context(), "table inet broken {\n\tchain c {\n\t\ttype filter hook "+hook+" priority 0\n\t\t"+rule+"\n\t}\n}\n", "nft", "-f", "-")
		return err
	}
	mend := func(n *lab.Namespace) error {
		_, err := n.Run(t.Context(), "nft", "delete", "table", "inet", "broken")
		return err
	}
	signal := func(p *lab.Process, sig unix.Signal) error { return unix.Kill(p.PID, sig) }
	if d, code := doctor(t, s, office+":443"); code != 0 || d.Broken() != nil {
		t.Fatalf("nothing is broken: exit code %d, %+v", code, d)
	}
	for _, tt := range []struct {
		name        string
		breaks, fix func() error
		args        []string
		link, says  string
	}{
		{"forwarding", func() error { return sysctl("net/ipv4/ip_forward", "0") }, func() error { return sysctl("net/ipv4/ip_forward", "1") },
			nil, "host settings", "sysctl -w net.ipv4.ip_forward=1"},
		{"TUN", func() error { return ip(s.Gateway, "link set ztg0 down") }, func() error { return ip(s.Gateway, "link set ztg0 up") },
			nil, "links", "ip link set ztg0 up"},
		{"kernel route", func() error { return ip(s.Gateway, "route replace 10.0.0.0/24 dev eth-vpc") },
			func() error { return ip(s.Gateway, "route del 10.0.0.0/24 dev eth-vpc") }, nil, "routes", "10.0.0.0/24"},
		{"firewall", func() error { return drop(s.Gateway, "forward", "iifname eth-vpc drop") }, func() error { return mend(s.Gateway) },
			nil, "firewall", "inet broken c (hook forward)"},
		{"policy of forwarding", func() error {
			_, err := s.Gateway.Input(t.Context(), "table ip filter {\n\tchain DOCKER-USER { }\n\tchain FORWARD {\n\t\ttype filter hook forward priority 0; policy drop\n\t\tjump DOCKER-USER\n\t}\n}\n", "nft", "-f", "-")
			return err
		}, func() error {
			_, err := s.Gateway.Run(t.Context(), "nft", "delete", "table", "ip", "filter")
			return err
		},
			nil, "firewall", "run iptables -I DOCKER-USER -i eth-vpc -o ztg0 -j ACCEPT"},
		{"VPC interface", func() error { return ip(s.Gateway, "link set eth-vpc down") }, func() error { return ip(s.Gateway, "link set eth-vpc up") },
			nil, "links", "ip link set eth-vpc up"},
		{"rule for clients", func() error { return ip(s.Gateway, "rule add from 172.31.0.77 to 10.0.0.0/24 prohibit") },
			func() error { return ip(s.Gateway, "rule del from 172.31.0.77 to 10.0.0.0/24 prohibit") },
			[]string{office + ":443", "--from", "172.31.0.77"}, "vpc", "10.0.0.0/24"},
		{"policy", nil, nil, []string{office + ":443", "--from", "192.0.2.9"}, "policy", "source_not_allowed"},
		{"no route", nil, nil, []string{"198.51.100.9"}, "vpc", "198.51.100.9"},
		{"member", nil, nil, []string{"10.0.0.77"}, "member", "nobody answers for 10.0.0.77"},
		{"size", func() error {
			return drop(s.Office, "prerouting", "iifname zt0 meta length > 1500 drop")
		}, func() error { return mend(s.Office) }, []string{office + ":443"}, "mtu", "packets of 2800 bytes vanish, and those of 1500 pass"},
		{"port", nil, nil, []string{office + ":81"}, "target", "refused"},
		{"silent port", func() error { return drop(s.Office, "input", "tcp dport 82 drop") }, func() error { return mend(s.Office) },
			[]string{office + ":82"}, "target", "is the service on, and does the host's firewall let it in?"},
		{"office stands still", func() error { return signal(s.OfficeProcess, unix.SIGSTOP) }, func() error { return signal(s.OfficeProcess, unix.SIGCONT) },
			[]string{office + ":443"}, "target", "member " + s.OfficeAddr},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.breaks != nil {
				if err := tt.breaks(); err != nil {
					t.Fatal(err)
				}
			}
			var d control.Diagnosis
			code := 0
			found := func() bool {
				d, code = doctor(t, s, tt.args...)
				l := d.Broken()
				return code == 4 && l != nil && l.Name == tt.link && strings.Contains(l.Detail+": "+l.Remedy, tt.says)
			}
			if !testwait.Poll(10*time.Second, found) {
				t.Errorf("exit code %d, first broken link %+v, want %s that says %q", code, d.Broken(), tt.link, tt.says)
			}
			after := false
			for _, l := range d.Links {
				if after && l.State != control.LinkNotReached {
					t.Errorf("%+v is told although a link before it is broken", l)
				}
				after = after || l.State == control.LinkBroken
			}
			if tt.fix != nil {
				if err := tt.fix(); err != nil {
					t.Fatal(err)
				}
			}
			testwait.NoError(t, 30*time.Second, func() error { return s.AwaitReady(t.Context()) })
		})
	}
	t.Run("root", func(t *testing.T) { // degraded, not broken
		s.RootProcess.Kill()
		testwait.For(t, 5*time.Minute, "the root to be missed", func() bool {
			h, err := s.GatewayAPI.Health(t.Context())
			return err == nil && !h.Online
		})
		h, err := s.GatewayAPI.Health(t.Context())
		if err != nil || h.State != control.Degraded || !h.Ready || !strings.Contains(strings.Join(h.Reasons, "\n"), "no root answers") {
			t.Errorf("%+v, %v", h, err)
		}
		d, code := doctor(t, s, office+":443")
		if code != 0 || d.Broken() != nil {
			t.Errorf("exit code %d, %+v", code, d)
		}
		if err := fetch(s); err != nil {
			t.Error(err)
		}
	})
	t.Run("not running", func(t *testing.T) { testDoctorAlone(t, s) })
}

// testDoctorAlone asks after the gateway was killed.
func testDoctorAlone(t *testing.T, s *lab.Scenario) {
	s.GatewayProcess.Kill()
	state := func(d control.Diagnosis, name string) control.LinkState {
		for _, l := range d.Links {
			if l.Name == name {
				return l.State
			}
		}
		return ""
	}
	d, code := doctor(t, s)
	if code != 3 || d.Running || d.Broken() == nil || d.Broken().Name != control.LinkGateway || state(d, "leftovers") != control.LinkDegraded {
		t.Errorf("exit code %d, %+v", code, d)
	}
	for _, tt := range []struct {
		link        string
		breaks, fix func() error
	}{
		{"host settings", func() error { return s.Gateway.Sysctl("net/ipv4/ip_forward", "0") }, func() error { return s.Gateway.Sysctl("net/ipv4/ip_forward", "1") }},
		{"home", func() error { return unix.Chmod(filepath.Join(s.GatewayProcess.Home, "identity.secret"), 0o644) },
			func() error { return unix.Chmod(filepath.Join(s.GatewayProcess.Home, "identity.secret"), 0o600) }},
		{"links", func() error {
			_, err := s.Gateway.Run(t.Context(), "ip", "tuntap", "add", "ztg0", "mode", "tun")
			return err
		},
			func() error {
				_, err := s.Gateway.Run(t.Context(), "ip", "tuntap", "del", "ztg0", "mode", "tun")
				return err
			}},
	} {
		if err := tt.breaks(); err != nil {
			t.Fatal(err)
		}
		if d, code := doctor(t, s); code != 4 || d.Broken() == nil || d.Broken().Name != tt.link {
			t.Errorf("%s: exit code %d, %+v", tt.link, code, d)
		}
		if err := tt.fix(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Gateway.Run(t.Context(), "nft", "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }"); err != nil {
		t.Fatal(err)
	}
	if d, code := doctor(t, s); code != 3 || state(d, "firewall") != control.LinkDegraded {
		t.Errorf("firewall: exit code %d, %+v", code, d)
	}
	if _, err := s.Gateway.Run(t.Context(), "nft", "add", "rule", "ip", "filter", "FORWARD", "iifname", "eth-vpc", "oifname", "ztg0", "accept"); err != nil {
		t.Fatal(err)
	}
	if d, code := doctor(t, s); code != 3 || state(d, "firewall") != control.LinkOK {
		t.Errorf("firewall with a rule for the TUN: exit code %d, %+v", code, d)
	}
	udp, err := s.Gateway.ListenPacket("udp", netip.AddrPortFrom(netip.IPv4Unspecified(), 9993).String())
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	if d, code := doctor(t, s); code != 4 || d.Broken() == nil || d.Broken().Name != "ports" || !strings.Contains(d.Broken().Detail, "9993") {
		t.Errorf("port: exit code %d, %+v", code, d)
	}
}

//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/internal/testwait"
	"ztgate/router/lab"
)

// homeServer is the manual's gateway in front of a home server, in both families.
const homeServer = `
exit: true
vpc: {interfaces: [eth0], nat_address: [44.128.0.11, "2600:1::11"]}
forwards:
  - {listen: "tcp/44.128.0.10:25", to: "10.77.0.7:2525", proxy_protocol: v2}
  - {listen: "tcp/44.128.0.10:80", to: "10.77.0.7:8080", proxy_protocol: v2}
  - {listen: "tcp/[2600:1::10]:25", to: "[fd77::7]:2525", proxy_protocol: v2}
  - {listen: "tcp/[2600:1::10]:80", to: "[fd77::7]:8080", proxy_protocol: v2}
  - {listen: "tcp/44.128.0.11:25", to: "10.77.0.7:25", masquerade: false}
  - {listen: "tcp/44.128.0.11:80", to: "10.77.0.7:80", masquerade: false}
  - {listen: "tcp/44.128.0.11:5201", to: "10.77.0.7:5201", masquerade: false}
  - {listen: "udp/44.128.0.11:5201", to: "10.77.0.7:5201", masquerade: false}
  - {listen: "tcp/[2600:1::11]:25", to: "[fd77::7]:25", masquerade: false}
  - {listen: "tcp/[2600:1::11]:80", to: "[fd77::7]:80", masquerade: false}
policy:
  rules:
    - {action: accept, direction: out, proto: tcp, to: [10.77.0.7, "fd77::7"], ports: [25, 80, 2525, 5201, 8080]}
    - {action: accept, direction: out, proto: udp, to: 10.77.0.7, ports: [5201]}
    - {action: drop, direction: out}
`

// Clients on the internet, the second ones of the same host.
const exitWebB, exitWebB6 = "44.129.0.81", "2600:2::81"

// TestHomeServer: a home server behind a NAT sends all its traffic out through the gateway, and
// has its web and mail on the gateway's public addresses, where it sees who its clients are.
func TestHomeServer(t *testing.T) { testHomeServer(t, "homes", (*exitLab).startHome) }

func TestHomeServerPacket(t *testing.T) {
	testHomeServer(t, "homep", (*exitLab).startHome, "--ingress", "packet")
}

func TestInteropHomeServer(t *testing.T) {
	binary := reference(t)
	testHomeServer(t, "homer", func(l *exitLab, t *testing.T) { l.startRealHome(t, binary) })
}

func testHomeServer(t *testing.T, name string, startHome func(*exitLab, *testing.T), args ...string) {
	l := startExitLab(t, name, true)
	for _, a := range []string{exitWebB + "/24", exitWebB6 + "/64"} {
		l.must(t, l.web.AddAddress("eth0", netip.MustParsePrefix(a)))
	}
	if len(args) > 0 { // the kernel would forward a copy
		l.must(t, l.gw.Sysctl("net/ipv4/ip_forward", "0"))
		l.must(t, l.gw.Sysctl("net/ipv6/conf/all/forwarding", "0"))
	}
	file := filepath.Join(l.Dir, "gw", "ztgate.yaml")
	l.must(t, os.WriteFile(file, []byte(homeServer), 0o600))
	l.gwProcess, l.gwAPI = l.ours(t, l.gw, "gw", append([]string{"run", "--network", l.network.String(), "--config", file}, args...)...)
	startHome(l, t)
	l.awaitSeen(t, false, exitNAT4)
	l.awaitSeen(t, true, exitNAT6)
	l.awaitDirect(t)

	web := startNginx(t, l.Topology, l.home, "nginx", `
http {
  log_format who '$remote_addr $proxy_protocol_addr $uri';
  access_log DIR/access.log who;
  server {
    listen 10.77.0.7:80; listen [fd77::7]:80;
    listen 10.77.0.7:8080 proxy_protocol; listen [fd77::7]:8080 proxy_protocol;
    location / { return 200 "seen\n"; }
    location /large { root DIR; }
  }
}`)
	l.must(t, os.WriteFile(filepath.Join(filepath.Dir(web), "large"), make([]byte, large), 0o644))
	mail := startPostfix(t, l.Topology, l.home, "homemail", homeOverlay+", "+homeOverlay6, `
smtp inet n - n - - smtpd
2525 inet n - n - - smtpd
  -o smtpd_upstream_proxy_protocol=haproxy
`)
	internetMail := startPostfix(t, l.Topology, l.web, "webmail", exitWeb+", "+exitWeb6, "smtp inet n - n - - smtpd\n")

	l.watchOwnWay(t)
	clients := []struct{ from, at, gateway string }{
		{exitWeb, exitGW, exitOverlay + " " + exitWeb}, {exitWebB, exitGW, exitOverlay + " " + exitWebB},
		{exitWeb6, exitGW6, exitOverlay6 + " " + exitWeb6}, {exitWebB6, exitGW6, exitOverlay6 + " " + exitWebB6},
		{exitWeb, exitNAT4, exitWeb + " -"}, {exitWebB, exitNAT4, exitWebB + " -"},
		{exitWeb6, exitNAT6, exitWeb6 + " -"}, {exitWebB6, exitNAT6, exitWebB6 + " -"},
	}
	visit := func(t *testing.T) {
		for i, c := range clients {
			path := fmt.Sprintf("/%s/%d", t.Name(), i)
			out := run(t, l.web, "curl", "-sS", "--max-time", "10", "--interface", c.from, "http://"+urlHost(c.at)+path)
			if out != "seen\n" {
				t.Errorf("%s at %s: %q", c.from, c.at, out)
			}
			if err := testwait.Try(soon, func() error {
				log, err := os.ReadFile(web)
				if err == nil && !strings.Contains(string(log), c.gateway+" "+path+"\n") {
					err = fmt.Errorf("%s at %s isn't seen as %q:\n%s", c.from, c.at, c.gateway, log)
				}
				return err
			}); err != nil {
				t.Error(err)
			}
		}
	}
	t.Run("web", visit)
	t.Run("mail", func(t *testing.T) {
		for _, c := range clients {
			if as := mail.seen(t, l.web, c.from, netip.AddrPortFrom(netip.MustParseAddr(c.at), 25)); as != c.from {
				t.Errorf("a mail of %s at %s comes from %s", c.from, c.at, as)
			}
		}
		for own, c := range map[string]struct{ at, as string }{homeOverlay: {exitWeb, exitNAT4}, homeOverlay6: {exitWeb6, exitNAT6}} {
			if as := internetMail.seen(t, l.home, own, netip.AddrPortFrom(netip.MustParseAddr(c.at), 25)); as != c.as {
				t.Errorf("a mail to the internet comes from %s, want %s", as, c.as)
			}
		}
	})
	t.Run("both ways at once", func(t *testing.T) {
		done, served := make(chan struct{}), make(chan error, 4)
		for _, at := range []string{exitGW, exitGW6, exitNAT4, exitNAT6} {
			go func() { served <- l.downloads(at, done) }()
		}
		l.witnesses(t)
		visit(t)
		close(done)
		for range cap(served) {
			if err := <-served; err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("iperf3", func(t *testing.T) {
		for _, m := range []lab.Iperf{{}, {Reverse: true}, {UDP: true, Bitrate: "10M", Length: 1200}, {UDP: true, Bitrate: "10M", Length: 1200, Reverse: true}} {
			m.Duration = time.Second
			for _, way := range []struct {
				name           string
				server, client *lab.Namespace
				at, listens    string
			}{{"out", l.web, l.home, exitWeb, exitWeb}, {"in", l.home, l.web, exitNAT4, homeOverlay}} {
				m.Server = netip.MustParseAddr(way.listens)
				got, err := lab.RunIperf(l.Context(), way.server, way.client, netip.MustParseAddr(way.at), m)
				if err != nil || got.Bytes == 0 || got.LostPercent > 10 { // a busy machine loses some
					t.Errorf("%s, %+v: %+v, %v", way.name, m, got, err)
				}
				t.Logf("%s, %+v: %.0f Mbit/s", way.name, m, got.BitsPerSecond/1e6)
			}
		}
	})
	t.Run("nothing else", func(t *testing.T) {
		echoOn(t, l.home, netip.MustParseAddrPort(homeOverlay+":7010"))
		run(t, l.web, "ip", "route", "add", homeOverlay+"/32", "via", exitFar)
		run(t, l.far, "ip", "route", "add", homeOverlay+"/32", "via", exitGW)
		for _, at := range []string{homeOverlay + ":7010", exitNAT4 + ":7010"} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if c, err := l.web.Dial(ctx, "tcp", at); err == nil {
				_ = c.Close()
				t.Errorf("%s is reached from the internet", at)
			}
			cancel()
		}
	})
}

// downloads fetches a large file of the home server until it shall end.
func (l *exitLab) downloads(at string, done <-chan struct{}) error {
	for n := 0; ; n++ {
		select {
		case <-done:
			if n == 0 {
				return fmt.Errorf("nothing was fetched at %s", at)
			}
			return nil
		default:
		}
		out, err := l.web.Run(l.Context(), "curl", "-sS", "--max-time", "60", "--limit-rate", "2M", "-o", "/dev/null", "-w", "%{size_download}", "http://"+urlHost(at)+"/large")
		if err != nil || string(out) != fmt.Sprint(large) {
			return fmt.Errorf("%s of %d bytes at %s: %w", out, large, at, err)
		}
	}
}

// direct reports nil if the gateway has direct paths to the root and the home server, by the
// internet's addresses.
func (l *exitLab) direct() error {
	peers, err := l.gwAPI.Peers(l.Context())
	if err != nil {
		return err
	}
	found := 0
	for _, p := range peers.Peers {
		if (p.Address == l.address["root"] || p.Address == l.address["home"]) && p.Link == "DIRECT" {
			found++
		}
	}
	if found != 2 {
		return fmt.Errorf("%d direct paths of 2", found)
	}
	return nil
}

func (l *exitLab) awaitDirect(t *testing.T) {
	t.Helper()
	testwait.NoError(t, 60*time.Second, l.direct)
}

// watchOwnWay watches until the end of the test that the gateway's own packets, and those of
// its overlay, go their way all the time.
func (l *exitLab) watchOwnWay(t *testing.T) {
	t.Helper()
	routing := func() string {
		return strip(run(t, l.gw, "ip", "rule") + run(t, l.gw, "ip", "-6", "rule") + run(t, l.gw, "ip", "route", "show", "table", "all") + run(t, l.gw, "ip", "-6", "route", "show", "table", "all"))
	}
	before := routing()
	for _, a := range []string{exitRoot, exitWeb, exitWeb6} {
		var out bytes.Buffer
		ping := l.gw.Command(l.Context(), "ping", "-n", "-q", "-i", "0.05", a)
		ping.Stdout = &out
		l.must(t, l.gw.Do(ping.Start))
		t.Cleanup(func() {
			_ = ping.Process.Signal(unix.SIGINT)
			err := ping.Wait()
			// The last one may be under way.
			var sent, got int
			if m := regexp.MustCompile(`\d+ packets transmitted, \d+ received`).FindString(out.String()); m != "" {
				_, _ = fmt.Sscanf(m, "%d packets transmitted, %d received", &sent, &got)
			}
			if err != nil || sent < 20 || got < sent-1 {
				t.Errorf("the gateway's own pings to %s: %v\n%s", a, err, out.String())
			}
			t.Logf("the gateway's own pings to %s: %d of %d answered", a, got, sent)
		})
	}
	done, watched := make(chan struct{}), make(chan error, 1)
	go func() {
		for n := 0; ; n++ {
			h, err := l.gwAPI.Health(l.Context())
			if err == nil {
				err = h.Err()
			}
			if err = errors.Join(err, l.direct()); err != nil {
				watched <- fmt.Errorf("look %d: %w", n, err)
				return
			}
			select {
			case <-done:
				watched <- nil
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	t.Cleanup(func() {
		close(done)
		if err := <-watched; err != nil {
			t.Errorf("the gateway's underlay: %v", err)
		}
		if after := routing(); after != before {
			t.Errorf("the gateway's routing before:\n%s\nafter:\n%s", before, after)
		}
	})
}

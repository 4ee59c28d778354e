//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/lab"
)

const forwardConfig = `
forwards:
  - {listen: "tcp/8443", to: "10.0.0.10:443"}
  - {listen: "udp/5353", to: "10.0.0.10:5353"}
  - {listen: "tcp/10.0.0.1:2222", to: "172.31.0.10:2222", from: overlay, masquerade: false}
`

// echoLines serves in a namespace: it sends back what it gets, after the client's
// address.
func echoLines(t *testing.T, n *lab.Namespace, address string) {
	t.Helper()
	l, err := n.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
				_, _ = fmt.Fprintln(c, host)
				_, _ = io.Copy(c, c)
			}()
		}
	}()
}

// echoDatagrams serves in a namespace: it sends back what it gets, and then the client's
// address.
func echoDatagrams(t *testing.T, n *lab.Namespace, address string) {
	t.Helper()
	host, err := n.ListenPacket("udp4", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = host.Close() })
	go func() {
		b := make([]byte, 4000)
		for {
			n, from, err := host.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = host.WriteTo(append(b[:n], from.String()...), from)
		}
	}()
}

// talk sends a line and returns what the other side says it comes from.
func talk(n *lab.Namespace, address string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	c, err := n.Dial(ctx, "tcp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	end, _ := ctx.Deadline()
	_ = c.SetDeadline(end)
	r := bufio.NewReader(c)
	who, err := r.ReadString('\n')
	if err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(c, "hello"); err != nil {
		return "", err
	}
	if line, err := r.ReadString('\n'); err != nil || line != "hello\n" {
		return "", fmt.Errorf("echo %q, %w", line, err)
	}
	return strings.TrimSpace(who), nil
}

func TestForwards(t *testing.T) {
	o := options(t)
	o.Config = forwardConfig
	s := start(t, o)
	t.Run("from the VPC", func(t *testing.T) {
		out := run(t, s.VPC, "curl", "-sSk", "--max-time", "5", "https://10.0.0.1:8443/")
		if !strings.Contains(out, "Office server") {
			t.Error(out)
		}
	})
	t.Run("at the host's address", func(t *testing.T) {
		out := run(t, s.VPC, "curl", "-sSk", "--max-time", "5", "https://172.31.0.1:8443/")
		if !strings.Contains(out, "You come from 10.0.0.1.") {
			t.Error(out)
		}
		testwait.NoError(t, 30*time.Second, func() error { // counted when it has ended
			m, err := s.Metrics(context.Background())
			if ok := m.Sum("ztgate_relayed_connections_total", map[string]string{"protocol": "tcp", "result": "ok"}); err == nil && ok != 1 {
				err = fmt.Errorf("ztgate_relayed_connections_total is %v", ok)
			}
			return err
		})
	})
	t.Run("datagrams", func(t *testing.T) {
		echoDatagrams(t, s.Office, office+":5353")
		// A host's own address, and the gateway's on the overlay.
		for at, size := range map[string]int{"172.31.0.1:5353": 2500, "10.0.0.1:5353": 1200} { // the former in fragments
			c, err := s.VPC.Dial(t.Context(), "udp4", at)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			big := strings.Repeat("q", size)
			if _, err := c.Write([]byte(big)); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 4000)
			n, err := c.Read(b)
			if err != nil || !strings.HasPrefix(string(b[:n]), big+"10.0.0.1:") {
				t.Errorf("%s: answer of %d bytes, %v", at, n, err)
			}
		}
	})
	t.Run("from the overlay", func(t *testing.T) {
		echoLines(t, s.VPC, "172.31.0.10:2222")
		who, err := talk(s.Office, "10.0.0.1:2222")
		if err != nil || who != office {
			t.Errorf("the VPC host sees %q, %v, want %s", who, err, office)
		}
	})
	t.Run("nothing else from the overlay", func(t *testing.T) {
		echoLines(t, s.VPC, "172.31.0.10:2223")
		run(t, s.Office, "ip", "route", "replace", "172.31.0.0/16", "via", "10.0.0.1")
		if who, err := talk(s.Office, "172.31.0.10:2223"); err == nil {
			t.Errorf("an overlay host reached a VPC host, which sees %s", who)
		}
	})
}

// A reload changes what is allowed, keeps flows that still are, and a faulty file
// changes nothing.
func TestReload(t *testing.T) {
	o := options(t)
	o.Config = "policy: {default: accept}\n"
	s := start(t, o)
	ctx := context.Background()
	echoLines(t, s.Office, office+":7")
	kept, err := s.VPC.Dial(ctx, "tcp", office+":7")
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	reader := bufio.NewReader(kept)
	if _, err := reader.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	alive := func() error {
		_ = kept.SetDeadline(time.Now().Add(3 * time.Second))
		if _, err := fmt.Fprintln(kept, "x"); err != nil {
			return err
		}
		_, err := reader.ReadString('\n')
		return err
	}

	reload := func(text string) (control.Reloaded, error) {
		if err := s.WriteConfig(text); err != nil {
			t.Fatal(err)
		}
		return s.GatewayAPI.Reload(ctx)
	}
	r, err := reload(`
policy:
  default: reject
  rules: [{action: accept, proto: tcp, to: 10.0.0.10/32, ports: [7]}]
nat: {max_flows: 4096}
`)
	if err != nil || strings.Join(r.Changed, " ") != "policy.default policy.rules" || strings.Join(r.Restart, " ") != "nat.max_flows" {
		t.Fatalf("%+v, %v", r, err)
	}
	if fetch(s) == nil {
		t.Error("the new policy isn't in force")
	}
	if err := alive(); err != nil {
		t.Errorf("a flow that is still allowed broke: %v", err)
	}
	x, err := s.GatewayAPI.Explain(ctx, control.Question{Source: netip.MustParseAddrPort("172.31.0.10:1000"), Destination: netip.MustParseAddrPort(office + ":443")})
	if err != nil || x.Verdict != "reject" || x.RuleText != "default reject" {
		t.Errorf("explain: %+v, %v", x, err)
	}

	if _, err := reload("policy: {default: perhaps}\n"); fault.ExitCode(err) != 2 || !strings.Contains(err.Error(), "perhaps") {
		t.Errorf("faulty file: %v", err)
	}
	if err := alive(); err != nil {
		t.Errorf("after a faulty file: %v", err)
	}

	if _, err := reload("policy: {default: accept}\n"); err != nil {
		t.Fatal(err)
	}
	if err := fetch(s); err != nil {
		t.Error(err)
	}
	x, err = s.GatewayAPI.Explain(ctx, control.Question{Source: netip.MustParseAddrPort("172.31.0.10:1000"), Destination: netip.MustParseAddrPort(office + ":443")})
	if err != nil || x.Verdict != "forward" || x.Translation != "masquerade" || x.Member != s.OfficeAddr || x.Path != "DIRECT" {
		t.Errorf("explain: %+v, %v", x, err)
	}

	// A policy that refuses a flow ends it.
	if _, err := reload("policy: {default: drop}\n"); err != nil {
		t.Fatal(err)
	}
	if err := alive(); err == nil {
		t.Error("a flow that is no longer allowed goes on")
	}
	// An empty file is more likely lost than meant.
	if _, err := reload("# nothing\n"); fault.ExitCode(err) != 2 || fetch(s) == nil {
		t.Errorf("an empty file: %v, or the policy is gone", err)
	}
	if _, err := reload("{}\n"); err != nil {
		t.Error(err)
	}
}

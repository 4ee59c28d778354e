//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"ztgate/internal/testwait"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/lab"
)

func packetOptions(t *testing.T, suffix string) lab.Options {
	o := options(t)
	o.Prefix += suffix
	o.Ingress = config.IngressPacket
	return o
}

// TestPacketGateway: a user's process with NET_RAW alone does what a gateway is for.
func TestPacketGateway(t *testing.T) {
	s := start(t, packetOptions(t, "pkt"))
	t.Run("privileges", func(t *testing.T) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.GatewayProcess.PID))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"Uid:\t65534\t65534\t65534\t65534", "CapEff:\t0000000000002000", "CapBnd:\t0000000000002000"} {
			if !strings.Contains(string(b), want) {
				t.Errorf("%q isn't in\n%s", want, b)
			}
		}
		if out := run(t, s.Gateway, "ip", "-o", "link"); strings.Contains(out, "ztg0") {
			t.Errorf("there is a TUN:\n%s", out)
		}
		if out := run(t, s.Gateway, "ip", "route"); strings.Contains(out, "10.0.0.0/24") {
			t.Errorf("there is a route:\n%s", out)
		}
		text := string(ask(t, s, "status"))
		for _, want := range []string{"ingress: packet, eth-vpc (flag --ingress)", "up     ", " ingress "} {
			if !strings.Contains(text, want) {
				t.Errorf("%q isn't in\n%s", want, text)
			}
		}
	})
	testGateway(t, s, "ttl=63", "10.0.0.1")
	t.Run("a kernel that forwards", func(t *testing.T) { testForwardingKernel(t, s) })
	t.Run("host's own traffic", func(t *testing.T) {
		out := run(t, s.VPC, "ping", "-c", "3", "-i", "0.2", "172.31.0.1")
		if !strings.Contains(out, " 0% packet loss") || strings.Contains(out, "DUP") {
			t.Error(out)
		}
	})
}

// testForwardingKernel: without NET_ADMIN nothing can be done about a kernel that forwards
// its copies of packets, but to say so.
func testForwardingKernel(t *testing.T, s *lab.Scenario) {
	ctx := context.Background()
	failed := func() (names []string, text string, err error) {
		h, err := s.GatewayAPI.Health(ctx)
		for _, c := range h.Failed() {
			names, text = append(names, c.Name), text+c.String()
		}
		return names, text, err
	}
	if err := s.Gateway.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	testwait.NoError(t, soon, func() error {
		names, text, err := failed()
		if !slices.Contains(names, "kernel_copies") || !strings.Contains(text, "sysctl -w net.ipv4.conf.eth-vpc.forwarding=0") {
			return fmt.Errorf("%q: %s, %v", names, text, err)
		}
		return nil
	})
	var d control.Diagnosis
	if d, _ = doctor(t, s); d.Broken() == nil || d.Broken().Name != "host settings" {
		t.Errorf("%+v", d.Links)
	}
	// The remedy is enough.
	if err := s.Gateway.Sysctl("net/ipv4/conf/eth-vpc/forwarding", "0"); err != nil {
		t.Fatal(err)
	}
	testwait.NoError(t, soon, func() error {
		names, text, err := failed()
		if slices.Contains(names, "kernel_copies") {
			return fmt.Errorf("%q: %s, %v", names, text, err)
		}
		return nil
	})
	if err := fetch(s); err != nil {
		t.Error(err)
	}
	if err := s.Gateway.Sysctl("net/ipv4/ip_forward", "0"); err != nil {
		t.Fatal(err)
	}
}

// Forwards, names and explain with packets from the interface.
func TestPacketTranslation(t *testing.T) {
	testTranslation(t, packetOptions(t, "pkf"))
}

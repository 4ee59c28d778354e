//go:build e2e

package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/lab"
)

// The scenario on libzt, alone and mixed with the node in Go and with real peers.
func TestLibzt(t *testing.T) {
	o := options(t)
	out, err := exec.Command(o.Binary, "version", "-j").Output()
	if err != nil {
		t.Fatal(err)
	}
	var b control.Build
	if err := json.Unmarshal(out, &b); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(b.Nodes, config.NodeLibzt) {
		t.Skipf("%s has no libzt: make test-libzt builds one that has", o.Binary)
	}
	real := os.Getenv("ZT_ONE")
	for _, c := range []struct {
		name                  string
		root, office, gateway lab.Program
	}{
		{"office_and_gateway", lab.Ours, lab.Libzt, lab.Libzt},
		{"gateway", lab.Ours, lab.Ours, lab.Libzt},
		{"office", lab.Ours, lab.Libzt, lab.Ours},
		{"gateway_office_real", lab.Ours, lab.Reference, lab.Libzt},
		{"gateway_root_and_office_real", lab.Reference, lab.Reference, lab.Libzt},
		{"office_gateway_real", lab.Ours, lab.Libzt, lab.Reference},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := options(t)
			o.Root, o.Office, o.Gateway, o.ZeroTierOne = c.root, c.office, c.gateway, real
			if real == "" && max(c.root, c.office, c.gateway) == lab.Reference {
				t.Skip("set ZT_ONE to the path of a zerotier-one to test with real peers")
			}
			s := start(t, o)
			r := &lab.Report{}
			err := s.Check(r)
			var text strings.Builder
			r.WriteText(&text)
			t.Log("\n" + text.String())
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range []lab.Iperf{{}, {Reverse: true}, {UDP: true, Bitrate: "20M", Length: 1200}, {UDP: true, Bitrate: "20M", Length: 1200, Reverse: true}} {
				m.Duration = duration(t)
				got, err := lab.RunIperf(s.Context(), s.Office, s.VPC, lab.OfficeAddress, m)
				if err != nil || got.Bytes == 0 || got.LostPercent > 10 { // as in TestInterop
					t.Errorf("%+v: %+v, %v", m, got, err)
				}
			}
			if s.GatewayAPI == nil {
				return
			}
			if c.gateway == lab.Libzt {
				metrics, err := s.Metrics(s.Context())
				if err != nil {
					t.Fatal(err)
				}
				if metrics.Sum("ztgate_build_info", map[string]string{"node": config.NodeLibzt}) != 1 {
					t.Error("ztgate_build_info doesn't say that the node is libzt")
				}
			}
			// Another implementation of the gateway's node in the same home has the same address,
			// is authorised and carries on.
			s.GatewayProcess.Stop()
			other := lab.Libzt
			if c.gateway == lab.Libzt {
				other = lab.Ours
			}
			s.SetGatewayProgram(other)
			if err := s.StartGateway(s.Context()); err != nil {
				t.Fatal(err)
			}
			testwait.NoError(t, 30*time.Second, func() error { return fetch(s) })
			info, err := s.GatewayAPI.Info(s.Context())
			if err != nil || info.Address != s.GatewayMember {
				t.Errorf("after the change of the node: %v, address %s, want %s", err, info.Address, s.GatewayMember)
			}
		})
	}
}

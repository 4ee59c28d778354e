package gateway

import (
	"log/slog"
	"slices"
	"strings"
	"testing"

	"ztgate/router/config"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// A node that this program doesn't have is refused where it is configured, with
// what to do; libzt is the default where it is built in.
func TestNodeImplementation(t *testing.T) {
	has := slices.Contains(config.NodeImplementations(), config.NodeLibzt)
	if want := map[bool]string{true: config.NodeLibzt, false: config.NodeGo}[has]; config.DefaultNode() != want {
		t.Errorf("default node %q, want %q", config.DefaultNode(), want)
	}
	for _, c := range []struct {
		node string
		want string // in the error, "" = none
	}{
		{"go", ""},
		{"libzt", map[bool]string{false: "built without libzt: use --node go"}[has]},
		{"rust", "use one of go"},
	} {
		cfg, err := config.Load(config.Sources{NoFile: true, Flags: map[string][]string{"node": {c.node}}})
		switch {
		case c.want == "" && (err != nil || cfg.Node != c.node):
			t.Errorf("--node %s: %v", c.node, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || fault.ExitCode(err) != 2):
			t.Errorf("--node %s: got %v (exit code %d), want %q", c.node, err, fault.ExitCode(err), c.want)
		}
	}
}

// What libzt can't do is a usage error before anything is opened.
func TestLibztLimits(t *testing.T) {
	if !slices.Contains(config.NodeImplementations(), config.NodeLibzt) {
		t.Skip("this build has no libzt")
	}
	for name, cfg := range map[string]NodeConfig{
		"controller":    {Controller: true},
		"low bandwidth": {Underlay: config.Underlay{LowBandwidth: true}},
		"sealed HELLO":  {Underlay: config.Underlay{SealedHello: ztnode.SealedHelloAuto}},
		"broken planet": {Planet: []byte("no planet")},
	} {
		cfg.Implementation, cfg.Home, cfg.Logger = config.NodeLibzt, t.TempDir(), slog.New(slog.DiscardHandler)
		if n, err := newNode(cfg); err == nil || fault.ExitCode(err) != 2 {
			t.Errorf("%s: got %v, %v, want a usage error", name, n, err)
		}
	}
}

// Either node opens a home that the other one has used, with the same address and
// networks.
func TestNodeChange(t *testing.T) {
	if !slices.Contains(config.NodeImplementations(), config.NodeLibzt) {
		t.Skip("this build has no libzt")
	}
	home := t.TempDir()
	const network ztnode.NetworkID = 0x8056c2e21c000001
	address := ""
	for i, name := range []string{config.NodeLibzt, config.NodeGo, config.NodeLibzt} {
		n, err := newNode(NodeConfig{Implementation: name, Home: home, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if i == 0 {
			address = n.Info().Address
			if err := n.Join(network); err != nil {
				t.Fatal(err)
			}
		}
		if nets := n.Networks(); n.Info().Address != address || len(nets) != 1 || nets[0].ID != network || nets[0].Status != ztnode.StatusRequesting {
			t.Errorf("%s: address %s, want %s; networks %+v", name, n.Info().Address, address, nets)
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

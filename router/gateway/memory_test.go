package gateway

import (
	"testing"

	"golang.org/x/sys/unix"

	"ztgate/router/config"
)

func TestFlowsFor(t *testing.T) {
	for limit, want := range map[int64]int{
		460 << 20: 405504, // of 512 MB: more than the default
		115 << 20: 52224,  // of 128 MB
		66 << 20:  minFlows, 16 << 20: minFlows, 0: minFlows,
	} {
		if got := flowsFor(limit); got != want {
			t.Errorf("%d MiB: %d flows, want %d", limit>>20, got, want)
		}
	}
}

// TestFitFlows: memory makes the flow table smaller, never larger, and never against
// the operator's word.
func TestFitFlows(t *testing.T) {
	load := func(flags map[string][]string) *config.Config {
		cfg, err := config.Load(config.Sources{NoFile: true, Flags: flags})
		if err != nil {
			t.Fatal(err)
		}
		return cfg
	}
	cfg := load(nil)
	fitted := cfg.FitFlows(50000, "memory limit of 113 MiB")
	if fitted.NAT.MaxFlows != 50000 || fitted.Origin("nat.max_flows") != "memory limit of 113 MiB" || cfg.NAT.MaxFlows != 262144 || cfg.Origin("nat.max_flows") != "default" {
		t.Errorf("%d from %s, and the original has %d from %s", fitted.NAT.MaxFlows, fitted.Origin("nat.max_flows"), cfg.NAT.MaxFlows, cfg.Origin("nat.max_flows"))
	}
	next, changed, restart, err := fitted.Reload()
	if err != nil || len(changed)+len(restart) > 0 || next.NAT.MaxFlows != 50000 || next.Origin("nat.max_flows") != fitted.Origin("nat.max_flows") {
		t.Errorf("reload: %d, %q, %q, %v", next.NAT.MaxFlows, changed, restart, err)
	}
	if got := cfg.FitFlows(1<<20, "x"); got.NAT.MaxFlows != 262144 || got.Origin("nat.max_flows") != "default" {
		t.Errorf("much memory: %d", got.NAT.MaxFlows)
	}
	if got := load(map[string][]string{"max-flows": {"100000"}}).FitFlows(50000, "x"); got.NAT.MaxFlows != 100000 {
		t.Errorf("against the operator: %d", got.NAT.MaxFlows)
	}
}

// TestMemoryOfMachine: the limit leaves a quarter of the machine to others.
func TestMemoryOfMachine(t *testing.T) {
	var s unix.Sysinfo_t
	if err := unix.Sysinfo(&s); err != nil {
		t.Fatal(err)
	}
	machine := uint64(s.Totalram) * uint64(s.Unit)
	if got, err := memory(); err != nil || got == 0 || got > machine*3/4+1<<20 {
		t.Errorf("%d MiB of %d, %v", got>>20, machine>>20, err)
	}
}

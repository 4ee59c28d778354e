package gateway

import (
	"errors"
	"fmt"
	"log/slog"
	"math"

	"github.com/KimMachineGun/automemlimit/memlimit"

	"ztgate/router/config"
)

const (
	// cgroupShare and machineShare are what the Go runtime may use of the memory that
	// this process has for itself, and of a machine's that others use too.
	cgroupShare  = 0.9
	machineShare = 0.75
	// memoryBesides is what everything but the flow table takes, and memoryPerFlow what
	// a flow does, with the lists of all flows that are made from time to time (its
	// entries and indexes alone take about 250 bytes).
	memoryBesides = 64 << 20
	memoryPerFlow = 1 << 10
	// minFlows is the smallest flow table that memory makes.
	minFlows = 4096
)

// limitMemory tells the runtime how much memory there is and fits the flow table into
// it, unless the operator chose its size. It returns the limit in bytes, 0 for none.
func limitMemory(cfg *config.Config, log *slog.Logger) (*config.Config, int64) {
	limit, err := memlimit.Set(memlimit.WithRatio(1), memlimit.WithProvider(memory))
	if err != nil {
		log.Warn("the memory limit isn't known: the flow table has its full size", "error", err)
		return cfg, 0
	}
	if limit == math.MaxInt64 {
		return cfg, 0
	}
	cfg = cfg.FitFlows(flowsFor(limit), fmt.Sprintf("memory limit of %d MiB", limit>>20))
	log.Info("memory", "limit_mib", limit>>20, "max_flows", cfg.NAT.MaxFlows, "from", cfg.Origin("nat.max_flows"))
	return cfg, limit
}

// memory is the lesser of what a control group and the machine leave us.
func memory() (uint64, error) {
	machine, err := memlimit.ApplyRatio(memlimit.FromSystem, machineShare)()
	if err != nil && !errors.Is(err, memlimit.ErrNoLimit) {
		return 0, err
	}
	group, gerr := memlimit.ApplyRatio(memlimit.FromCgroup, cgroupShare)()
	switch {
	case gerr == nil && (err != nil || group < machine):
		return group, nil
	case err == nil:
		return machine, nil
	}
	return 0, memlimit.ErrNoLimit
}

// flowsFor returns how many flows fit into so many bytes.
func flowsFor(limit int64) int {
	return int(max(minFlows, (limit-memoryBesides)/memoryPerFlow))
}

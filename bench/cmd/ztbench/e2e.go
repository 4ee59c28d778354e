package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/lab"
)

// setup is one gateway to measure and who it talks to.
type setup struct {
	name            string
	office, gateway lab.Program
	kernel          bool
}

// figures are the medians of one setup.
type figures struct {
	up, down          float64 // bit/s, to and from the office
	upCPU, downCPU    float64 // gateway process, s per GB; < 0 if there is none
	upAll, downAll    float64 // whole machine, s per GB
	rtt               time.Duration
	ready             time.Duration
	memory            int // bytes, idle
	udpUp, udpDown    float64
	udpLost, udpLost2 float64
}

const defaultPrefix = lab.DefaultPrefix + "bench"

func endToEnd(ctx context.Context, w io.Writer, o options) error {
	setups := []setup{{name: "ztgate, office `ztgate member`"}}
	libzt, err := hasLibzt(ctx, o.binary)
	if err != nil {
		return err
	}
	if libzt {
		setups = append(setups, setup{name: "ztgate with libzt, office `ztgate member`", gateway: lab.Libzt})
		if o.reference != "" {
			setups = append(setups, setup{name: "ztgate with libzt, office zerotier-one", office: lab.Reference, gateway: lab.Libzt})
		}
	}
	if o.reference != "" {
		setups = append(setups,
			setup{name: "ztgate, office zerotier-one", office: lab.Reference},
			setup{name: "zerotier-one + nftables, office zerotier-one", office: lab.Reference, gateway: lab.Reference},
			setup{name: "zerotier-one + nftables, office `ztgate member`", gateway: lab.Reference})
	}
	setups = append(setups, setup{name: "kernel forwarding + nftables, no overlay", kernel: true})
	all := make([][]figures, len(setups))
	for round := range o.rounds { // in turn, so that a noisy minute hits all
		for i, s := range setups {
			fmt.Fprintf(os.Stderr, "round %d of %d: %s\n", round+1, o.rounds, s.name)
			f, err := measure(ctx, s, o)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			all[i] = append(all[i], f)
		}
	}
	fmt.Fprintf(w, "## End to end\n\niperf3 from a VPC client through the gateway to the office and back, %v each, medians of %d rounds.\n", o.duration, o.rounds)
	fmt.Fprintln(w, "CPU is in seconds per gigabyte carried: of the gateway's process, and of the whole machine with client and office.")
	fmt.Fprintln(w)
	fmt.Fprintln(w, "| gateway | TCP to office, Mbit/s | TCP from office, Mbit/s | gateway CPU to / from | machine CPU to / from | ping RTT | UDP 1200 B to / from, Mbit/s (lost) | ready after | idle RSS |")
	fmt.Fprintln(w, "| --- | --: | --: | --: | --: | --: | --: | --: | --: |")
	for i, s := range setups {
		row(w, s, all[i])
	}
	return nil
}

// hasLibzt reports whether a program has the node on libzt too.
func hasLibzt(ctx context.Context, binary string) (bool, error) {
	out, err := exec.CommandContext(ctx, binary, "version", "-j").Output()
	if err != nil {
		return false, fmt.Errorf("%s version: %w", binary, err)
	}
	var b control.Build
	err = json.Unmarshal(out, &b)
	return slices.Contains(b.Nodes, config.NodeLibzt), err
}

func row(w io.Writer, s setup, list []figures) {
	m := func(f func(figures) float64) float64 {
		v := make([]float64, len(list))
		for i := range list {
			v[i] = f(list[i])
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	cpu := func(f func(figures) float64) string {
		if v := m(f); v >= 0 {
			return fmt.Sprintf("%.1f", v)
		}
		return "-"
	}
	ready, memory := "-", "-"
	if !s.kernel {
		ready = fmt.Sprintf("%.1f s", m(func(f figures) float64 { return f.ready.Seconds() }))
		memory = fmt.Sprintf("%.0f MB", m(func(f figures) float64 { return float64(f.memory) })/(1<<20))
	}
	fmt.Fprintf(w, "| %s | %.0f | %.0f | %s / %s | %.1f / %.1f | %.2f ms | %.0f (%.1f %%) / %.0f (%.1f %%) | %s | %s |\n", s.name,
		m(func(f figures) float64 { return f.up })/1e6, m(func(f figures) float64 { return f.down })/1e6,
		cpu(func(f figures) float64 { return f.upCPU }), cpu(func(f figures) float64 { return f.downCPU }),
		m(func(f figures) float64 { return f.upAll }), m(func(f figures) float64 { return f.downAll }),
		m(func(f figures) float64 { return f.rtt.Seconds() * 1000 }),
		m(func(f figures) float64 { return f.udpUp })/1e6, m(func(f figures) float64 { return f.udpLost }),
		m(func(f figures) float64 { return f.udpDown })/1e6, m(func(f figures) float64 { return f.udpLost2 }),
		ready, memory)
}

func measure(ctx context.Context, s setup, o options) (f figures, err error) {
	if s.kernel {
		k, err := lab.StartKernel(ctx, o.prefix)
		if err != nil {
			return f, err
		}
		defer func() { err = errors.Join(err, k.Close(), os.RemoveAll(k.LogDir)) }()
		return f, f.run(ctx, k.Office, k.VPC, k.OfficeAddress, nil, o)
	}
	sc, err := lab.Start(ctx, lab.Options{Binary: o.binary, Prefix: o.prefix, ZeroTierOne: o.reference, Office: s.office, Gateway: s.gateway,
		LogLevel: "warn"})
	if sc == nil {
		return f, err
	}
	defer func() { err = errors.Join(err, sc.Close(), os.RemoveAll(sc.LogDir)) }()
	if err != nil {
		return f, err
	}
	f.ready = sc.ReadyAfter()
	if f.memory, err = residentMemory(sc.GatewayProcess.PID); err != nil {
		return f, err
	}
	return f, f.run(ctx, sc.Office, sc.VPC, lab.OfficeAddress, sc.GatewayProcess, o)
}

// run measures between two namespaces; gateway may be nil.
func (f *figures) run(ctx context.Context, office, vpc *lab.Namespace, to netip.Addr, gateway *lab.Process, o options) (err error) {
	const pings = 20
	var rtts []time.Duration
	for range pings {
		d, err := vpc.Ping(ctx, to)
		if err != nil {
			return err
		}
		rtts = append(rtts, d)
	}
	slices.Sort(rtts)
	f.rtt = rtts[pings/2]
	for _, m := range []struct {
		reverse   bool
		rate      *float64
		cpu, both *float64
	}{{false, &f.up, &f.upCPU, &f.upAll}, {true, &f.down, &f.downCPU, &f.downAll}} {
		process0, err := processCPU(gateway)
		if err != nil {
			return err
		}
		machine0, err := machineCPU()
		if err != nil {
			return err
		}
		r, err := lab.RunIperf(ctx, office, vpc, to, lab.Iperf{Reverse: m.reverse, Duration: o.duration})
		if err != nil {
			return err
		}
		process1, err := processCPU(gateway)
		if err != nil {
			return err
		}
		machine1, err := machineCPU()
		if err != nil {
			return err
		}
		gb := r.Bytes / 1e9
		*m.rate, *m.both = r.BitsPerSecond, (machine1-machine0).Seconds()/gb
		*m.cpu = -1
		if gateway != nil {
			*m.cpu = (process1 - process0).Seconds() / gb
		}
	}
	for _, m := range []struct {
		reverse    bool
		rate, lost *float64
	}{{false, &f.udpUp, &f.udpLost}, {true, &f.udpDown, &f.udpLost2}} {
		r, err := lab.RunIperf(ctx, office, vpc, to, lab.Iperf{UDP: true, Bitrate: "100M", Length: 1200, Reverse: m.reverse, Duration: o.duration})
		if err != nil {
			return err
		}
		*m.rate, *m.lost = r.BitsPerSecond, r.LostPercent
	}
	return nil
}

func processCPU(p *lab.Process) (time.Duration, error) {
	if p == nil {
		return 0, nil
	}
	return p.CPU()
}

// machineCPU returns the processor time that all processes and the kernel used
// since boot.
func machineCPU() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	fields := strings.Fields(string(line)) // cpu user nice system idle iowait irq softirq steal
	if len(fields) < 8 {
		return 0, errors.New("/proc/stat: odd format")
	}
	var ticks int64
	for _, i := range []int{1, 2, 3, 6, 7} {
		v, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		ticks += v
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil
}

// residentMemory returns the resident set of a process in bytes.
func residentMemory(pid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0, errors.New("statm: odd format")
	}
	pages, err := strconv.Atoi(fields[1])
	return pages * os.Getpagesize(), err
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"ztgate/netstack"
	"ztgate/router/host/tuntap"
	"ztgate/router/lab"
)

// The plane alone: a client and a server in namespaces, each behind a TUN of this
// process, and between the TUNs nothing, or the engine with its translation.
const (
	planeNetwork = 0x8056c2e21c000001
	planeMTU     = 1500
	planeHead    = 14 // Ethernet
	planeFront   = 96 // room in front of packets read for an overlay
)

var (
	planeClient = netip.MustParsePrefix("172.16.0.2/16")
	planeServer = netip.MustParsePrefix("10.0.0.10/24")
	planeOurs   = netip.MustParsePrefix("10.0.0.1/24")
	planeMAC    = [6]byte{2, 0, 0, 0, 0, 1}
	serverMAC   = [6]byte{2, 0, 0, 0, 0, 9}
)

type planeResult struct{ up, down, upCPU, downCPU float64 } // bit/s, s per GB

// planeOnly compares the engine between two TUNs with an echo between the same.
func planeOnly(ctx context.Context, w io.Writer, o options) error {
	var all [2][]planeResult
	for round := range o.rounds {
		for i, nat := range []bool{false, true} {
			fmt.Fprintf(os.Stderr, "round %d of %d: TUN to TUN, NAT %v\n", round+1, o.rounds, nat)
			r, err := measurePlane(ctx, o, nat)
			if err != nil {
				return fmt.Errorf("TUN to TUN: %w", err)
			}
			all[i] = append(all[i], r)
		}
	}
	median := func(list []planeResult, f func(planeResult) float64) float64 {
		v := make([]float64, len(list))
		for i := range list {
			v[i] = f(list[i])
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	fmt.Fprintf(w, "\n## TUN to TUN\n\niperf3 between two namespaces, each behind a TUN of one process, MTU %d, %v each, medians of %d rounds. CPU is of that\n", planeMTU, o.duration, o.rounds)
	fmt.Fprintln(w, "process, in seconds per gigabyte.")
	fmt.Fprintln(w)
	fmt.Fprintln(w, "| between the TUNs | TCP to / from, Mbit/s | CPU to / from |")
	fmt.Fprintln(w, "| --- | --: | --: |")
	for i, name := range []string{"nothing: packets are written as they were read", "the engine, with masquerade"} {
		fmt.Fprintf(w, "| %s | %.0f / %.0f | %.2f / %.2f |\n", name,
			median(all[i], func(r planeResult) float64 { return r.up })/1e6, median(all[i], func(r planeResult) float64 { return r.down })/1e6,
			median(all[i], func(r planeResult) float64 { return r.upCPU }), median(all[i], func(r planeResult) float64 { return r.downCPU }))
	}
	ratio := func(f func(planeResult) float64) float64 { return median(all[1], f) / median(all[0], f) }
	fmt.Fprintf(w, "| ratio | %.2f / %.2f | %.2f / %.2f |\n",
		ratio(func(r planeResult) float64 { return r.up }), ratio(func(r planeResult) float64 { return r.down }),
		ratio(func(r planeResult) float64 { return r.upCPU }), ratio(func(r planeResult) float64 { return r.downCPU }))
	return nil
}

func measurePlane(ctx context.Context, o options, nat bool) (r planeResult, err error) {
	t, err := lab.New(ctx, o.prefix)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	client, clientTUN, err := planeHost(ctx, t, "client", planeClient, "10.0.0.0/24")
	if err != nil {
		return r, err
	}
	defer clientTUN.Close()
	server, serverTUN, err := planeHost(ctx, t, "server", planeServer, "172.16.0.0/16")
	if err != nil {
		return r, err
	}
	defer serverTUN.Close()

	run, stop := context.WithCancel(ctx)
	group, run := errgroup.WithContext(run)
	defer func() {
		stop()
		_ = clientTUN.Close()
		_ = serverTUN.Close()
		if e := group.Wait(); !errors.Is(e, os.ErrClosed) {
			err = errors.Join(err, e)
		}
	}()
	if nat {
		link := &tunLink{tun: serverTUN}
		if link.engine, err = netstack.New(netstack.Config{Device: clientTUN, Overlay: link, VPC: netstack.VPC{MTU: planeMTU}}); err != nil {
			return r, err
		}
		if err := link.engine.SetNetworks([]netstack.Network{{ID: planeNetwork, MAC: planeMAC, MTU: planeMTU, Masquerade: true,
			Addresses: []netip.Prefix{planeOurs}}}); err != nil {
			return r, err
		}
		group.Go(func() error { return link.engine.Run(run) })
		group.Go(link.read)
	} else {
		group.Go(func() error { return echo(clientTUN, serverTUN) })
		group.Go(func() error { return echo(serverTUN, clientTUN) })
	}
	for _, reverse := range []bool{false, true} {
		start := ownCPU()
		got, err := lab.RunIperf(ctx, server, client, planeServer.Addr(), lab.Iperf{Duration: o.duration, Reverse: reverse})
		if err != nil {
			return r, err
		}
		perGB := (ownCPU() - start).Seconds() / (got.Bytes / 1e9)
		if reverse {
			r.down, r.downCPU = got.BitsPerSecond, perGB
		} else {
			r.up, r.upCPU = got.BitsPerSecond, perGB
		}
	}
	return r, nil
}

// planeHost makes a namespace whose only way out is a TUN.
func planeHost(ctx context.Context, t *lab.Topology, name string, addr netip.Prefix, to string) (*lab.Namespace, *tuntap.TUN, error) {
	n, err := t.Namespace(name)
	if err != nil {
		return nil, nil, err
	}
	how := tuntap.Writev
	if tuntap.Probe() == nil {
		how = tuntap.IOUring
	}
	var dev *tuntap.TUN
	if err := n.Do(func() (err error) { dev, err = tuntap.OpenTUN("zttun", how); return err }); err != nil {
		return nil, nil, err
	}
	err = func() error {
		if err := n.AddAddress("zttun", addr); err != nil {
			return err
		}
		if out, err := n.Run(ctx, "ip", "link", "set", "zttun", "mtu", fmt.Sprint(planeMTU)); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if out, err := n.Run(ctx, "ip", "route", "replace", to, "dev", "zttun"); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}()
	if err != nil {
		return nil, nil, errors.Join(err, dev.Close())
	}
	return n, dev, nil
}

func planeBuffers(n, front int) (bufs [][]byte, sizes []int) {
	const size = planeFront + 2048
	store := make([]byte, n*size)
	for i := range n {
		bufs = append(bufs, store[i*size+planeFront-front:(i+1)*size:(i+1)*size])
	}
	return bufs, make([]int, n)
}

// echo writes to one TUN what it reads from the other.
func echo(from, to *tuntap.TUN) error {
	bufs, sizes := planeBuffers(from.BatchSize(), planeHead)
	out := make([][]byte, 0, len(bufs))
	for {
		n, err := from.Read(bufs, sizes, planeHead)
		if err != nil {
			return err
		}
		out = out[:0]
		for i := range n {
			out = append(out, bufs[i][:planeHead+sizes[i]])
		}
		if _, err := to.Write(out, planeHead); err != nil {
			return err
		}
	}
}

// tunLink is an overlay network with one host, who is behind a TUN.
type tunLink struct {
	tun    *tuntap.TUN
	engine *netstack.Engine
}

// WriteFrames answers ARP for the host and gives it packets.
func (l *tunLink) WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	out := make([][]byte, 0, 128)
	for i, b := range bufs {
		switch f := b[offset : offset+sizes[i]]; {
		case f[12] == 0x08 && f[13] == 0x00:
			out = append(out, b[offset:offset+sizes[i]])
		case f[12] == 0x08 && f[13] == 0x06 && f[21] == 1:
			a := slices.Clone(f)
			copy(a, f[6:12])
			copy(a[6:], serverMAC[:])
			a[21] = 2
			copy(a[22:], serverMAC[:])
			copy(a[28:], f[38:42])
			copy(a[32:], f[22:32])
			l.engine.Deliver(nwid, [][]byte{a})
		}
	}
	if _, err := l.tun.Write(out, planeHead); err != nil {
		return 0, err
	}
	return len(bufs), nil
}

// read delivers what the host sends.
func (l *tunLink) read() error {
	bufs, sizes := planeBuffers(l.tun.BatchSize(), planeHead)
	for _, b := range bufs {
		copy(b, planeMAC[:])
		copy(b[6:], serverMAC[:])
		b[12], b[13] = 0x08, 0x00
	}
	frames := make([][]byte, 0, len(bufs))
	for {
		n, err := l.tun.Read(bufs, sizes, planeHead)
		if err != nil {
			return err
		}
		frames = frames[:0]
		for i := range n {
			frames = append(frames, bufs[i][:planeHead+sizes[i]])
		}
		l.engine.Deliver(planeNetwork, frames)
	}
}

func ownCPU() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

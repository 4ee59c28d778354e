package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

func join[T any](list []T) string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = fmt.Sprint(v)
	}
	return strings.Join(out, ",")
}

func (a *app) statusCommand() *cobra.Command {
	return show(a, "status", "Show the state on one screen",
		func(ctx context.Context, c *control.Client) (control.Status, error) { return c.Status(ctx) },
		func(w io.Writer, s control.Status) {
			fmt.Fprintf(w, "%s %s, %s (%s, version %s, up %v)\n", s.Info.Address, s.Info.State(), s.Health.State, s.Info.Mode,
				s.Info.Build.Version, time.Since(s.Info.Started).Round(time.Second))
			fmt.Fprintf(w, "peers: %d direct, %d by relay, %d without path\n", s.Peers.Direct, s.Peers.Relay, s.Peers.None)
			for _, m := range s.Info.PortMappings {
				fmt.Fprintf(w, "port mapping: %s at %s is mapped to UDP port %d (%s)\n", m.External, m.Gateway, m.Port, m.Protocol)
			}
			if s.Ingress != nil {
				fmt.Fprintf(w, "ingress: %s\n", s.Ingress)
			}
			if len(s.SeenAs) > 0 {
				fmt.Fprintf(w, "overlay hosts are seen in the VPC as: %s\n", strings.Join(s.SeenAs, ", "))
			}
			for _, e := range s.Exits {
				fmt.Fprintf(w, "default route: by %s\n", e)
			}
			if s.Limit > 0 {
				fmt.Fprintf(w, "flows: %d of %d\n", s.Flows, s.Limit)
			}
			if s.Writes != nil {
				fmt.Fprintf(w, "packets to interfaces: %s\n", s.Writes)
			}
			if s.MemoryLimit > 0 {
				fmt.Fprintf(w, "memory limit: %d MiB\n", s.MemoryLimit>>20)
			}
			if s.Relayed != nil {
				fmt.Fprintf(w, "relayed connections: %s\n", s.Relayed)
			}
			for _, l := range s.Limited {
				fmt.Fprintf(w, "over its limit: %s, %d %s refused\n", l.Client, l.Refused, l.What)
			}
			for _, c := range s.Health.Failed() {
				fmt.Fprintf(w, "%s, %s: %s\n", c.Severity, c.Name, ztnode.Printable(c.String()))
			}
			fmt.Fprintln(w)
			networkTable(w, s.Networks)
			for _, n := range s.Networks {
				if !n.LastController.IsZero() {
					fmt.Fprintf(w, "%s: controller %s last heard %s\n", n.ID, n.ID.Controller(), ago(n.LastController))
				}
			}
			if len(s.Targets) > 0 {
				fmt.Fprintln(w)
				row(w, "TARGET", "STATE", "CONNECT", "THROUGH", "MEMBER", "LINK", "ERROR")
				for _, t := range s.Targets {
					up, ms := "down", ""
					if t.Up {
						up, ms = "up", millis(t.ConnectMS)
					}
					row(w, t.Target, up, ms, t.Through, t.Member, t.Path, t.Error)
				}
			}
			if len(s.Names) > 0 {
				fmt.Fprintln(w)
				row(w, "NAME", "ADDRESSES", "LAST ANSWER", "ERROR")
				for _, n := range s.Names {
					row(w, n.Name, join(n.Addresses), ago(n.LastAnswer), n.Error)
				}
			}
			if s.DNS != nil {
				fmt.Fprintln(w)
				dnsTable(w, s.DNS)
			}
			if len(s.Drops) > 0 {
				fmt.Fprintln(w)
				dropsTable(w, s.Drops)
			}
		})
}

func millis(v float64) string {
	if v < 0 {
		return ""
	}
	return fmt.Sprintf("%.2f ms", v)
}

func networkTable(w io.Writer, nets []control.NetworkView) {
	row(w, "NETWORK", "NAME", "MAC", "STATUS", "TYPE", "DEVICE", "ADDRESSES")
	for _, n := range nets {
		row(w, n.ID, n.Name, n.MAC, n.Status, n.Type, n.Device, join(n.Addresses))
	}
	for _, n := range nets {
		for _, p := range n.Problems {
			fmt.Fprintf(w, "%s: %s\n", n.ID, ztnode.Printable(p))
		}
	}
}

func (a *app) infoCommand() *cobra.Command {
	return show(a, "info", "Show the node",
		func(ctx context.Context, c *control.Client) (control.Info, error) { return c.Info(ctx) },
		func(w io.Writer, i control.Info) {
			row(w, "ADDRESS", "VERSION", "STATE", "MODE", "PORT", "PLANET", "ROOT", "CONTROLLER")
			row(w, i.Address, i.Version, i.State(), i.Mode, i.PrimaryPort, i.PlanetID, yesNo(i.Root), yesNo(i.Controller))
		})
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func (a *app) networksCommand() *cobra.Command {
	cmd := show(a, "networks", "List the joined networks",
		func(ctx context.Context, c *control.Client) (control.Networks, error) { return c.Networks(ctx) },
		func(w io.Writer, n control.Networks) { networkTable(w, n.Networks) })
	cmd.Aliases = []string{"listnetworks"}
	return cmd
}

func (a *app) peersCommand() *cobra.Command {
	cmd := show(a, "peers", "List peers and their paths",
		func(ctx context.Context, c *control.Client) (control.Peers, error) { return c.Peers(ctx) },
		func(w io.Writer, p control.Peers) {
			row(w, "ADDRESS", "VERSION", "ROLE", "LATENCY", "LINK", "LAST TX", "LAST RX", "MTU", "PATH")
			for _, peer := range p.Peers {
				var best ztnode.Path
				for _, path := range peer.Paths {
					if path.Preferred {
						best = path
					}
				}
				endpoint := ""
				if best.Endpoint.IsValid() {
					endpoint = best.Endpoint.String()
				}
				heard := best.LastReceive
				if heard.IsZero() {
					heard = peer.LastReceive // by a way that isn't there any more
				}
				mtu := ""
				if best.MTU != 0 {
					mtu = strconv.Itoa(best.MTU)
				}
				row(w, peer.Address, peer.Version, peer.Role, millis(peer.Latency), peer.Link, ago(best.LastSend), ago(heard), mtu, endpoint)
			}
		})
	cmd.Aliases = []string{"listpeers"}
	return cmd
}

func ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return fmt.Sprintf("%.1f s ago", max(time.Since(t), 0).Seconds())
}

func (a *app) flowsCommand() *cobra.Command {
	var q control.FlowQuery
	cmd := show(a, "flows", "List live flows, the busiest first",
		func(ctx context.Context, c *control.Client) (control.Flows, error) { return c.Flows(ctx, q) },
		func(w io.Writer, f control.Flows) {
			row(w, "PROTO", "STATE", "SOURCE", "DESTINATION", "TRANSLATED", "AGE", "BYTES OUT", "BYTES IN", "RELAYED")
			for _, flow := range f.Flows {
				translated := ""
				switch {
				case flow.Translated.IsValid() && flow.Translated != flow.Source:
					translated = flow.Translated.String()
				case flow.TranslatedDst.IsValid() && flow.TranslatedDst != flow.Destination:
					translated = flow.TranslatedDst.String()
				}
				relayed := ""
				if flow.Relayed {
					relayed = "yes"
				}
				if flow.Behind.IsValid() {
					relayed = "behind " + flow.Behind.String()
				}
				row(w, flow.Protocol, flow.State, endpoint(flow.Source), endpoint(flow.Destination), translated,
					fmt.Sprintf("%.0f s", flow.AgeSeconds), flow.BytesOut, flow.BytesIn, relayed)
			}
			if f.Total > len(f.Flows) {
				fmt.Fprintf(w, "%d of %d flows shown\n", len(f.Flows), f.Total)
			}
		})
	f := cmd.Flags()
	prefixFlag(f, &q.To, "to", "only flows to an address or prefix")
	prefixFlag(f, &q.From, "from", "only flows that an address or prefix opened")
	protocolFlag(f, &q.Protocol, "proto", "only flows of a protocol: tcp, udp, icmp")
	f.StringVar(&q.State, "state", "", "only flows in a state, as the column STATE shows it")
	networkFlag(f, &q.Network, "network", "only flows of a network")
	countFlag(f, &q.Top, "top", "", 0, 1, control.MaxFlows, "show only so many flows")
	return cmd
}

func (a *app) dropsCommand() *cobra.Command {
	return show(a, "drops", "List the packets that were dropped last, and why",
		func(ctx context.Context, c *control.Client) (control.Drops, error) { return c.Drops(ctx) },
		func(w io.Writer, d control.Drops) {
			dropsTable(w, d.Drops)
			seen := map[string]bool{}
			for _, x := range d.Drops {
				if !seen[x.Reason] {
					seen[x.Reason] = true
					fmt.Fprintf(w, "%s: %s %s\n", x.Reason, x.Meaning, x.Remedy)
				}
			}
		})
}

func dropsTable(w io.Writer, list []control.Drop) {
	row(w, "DROPPED BECAUSE", "FROM", "MEMBER", "PROTO", "SOURCE", "DESTINATION", "PACKETS", "LAST", "FIRST")
	for _, x := range list {
		row(w, x.Reason, x.Side, x.Member, x.Protocol, endpoint(x.Source), endpoint(x.Destination), x.Count, ago(x.Last), ago(x.First))
	}
}

func endpoint(ap netip.AddrPort) string {
	if !ap.IsValid() {
		return ""
	}
	return ap.String()
}

func (a *app) joinCommand() *cobra.Command {
	return a.networkCommand("join NWID", "Join a network, also at later starts", "joined", (*control.Client).Join)
}

func (a *app) leaveCommand() *cobra.Command {
	return a.networkCommand("leave NWID", "Leave a network and forget it", "left", (*control.Client).Leave)
}

func (a *app) networkCommand(use, short, done string, do func(*control.Client, context.Context, string) (control.Networks, error)) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		n, err := do(a.client(), cmd.Context(), args[0])
		if err != nil {
			return err
		}
		return a.print(n, func(w io.Writer) { fmt.Fprintf(w, "%s %s\n", done, args[0]) })
	}}
}

func (a *app) pingCommand() *cobra.Command {
	var count int
	var timeout, interval time.Duration
	cmd := &cobra.Command{
		Use: "ping HOST[:PORT]", Short: "Ping a host through the overlay; with a port, connect by TCP", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := control.ParsePingTarget(args[0])
			if err != nil {
				return err
			}
			req.TimeoutMS = int(timeout.Milliseconds())
			var last error
			answered := 0
			for i := range count {
				if i > 0 {
					select {
					case <-cmd.Context().Done():
						return cmd.Context().Err()
					case <-time.After(interval):
					}
				}
				p, err := a.client().Ping(cmd.Context(), req)
				if err != nil {
					if fault.KindOf(err) != fault.KindFailed {
						return err
					}
					last = err
					fmt.Fprintln(a.errOut, ztnode.Printable(err.Error()))
					continue
				}
				answered++
				if err := a.print(p, func(w io.Writer) { printPing(w, args[0], p) }); err != nil {
					return err
				}
			}
			if answered == 0 {
				return last
			}
			return nil
		},
	}
	countFlag(cmd.Flags(), &count, "count", "c", 3, 1, 1e6, "how many times")
	durationFlag(cmd.Flags(), &timeout, "timeout", "", 5*time.Second, time.Millisecond, control.MaxPingTimeout, "how long to wait for each answer")
	durationFlag(cmd.Flags(), &interval, "interval", "i", time.Second, time.Millisecond, time.Hour, "pause between two")
	return cmd
}

func printPing(w io.Writer, target string, p control.Ping) {
	fmt.Fprintf(w, "answer from %s", target)
	if p.Path != "" {
		fmt.Fprintf(w, " by %s %s", p.Peer, p.Path)
	}
	fmt.Fprintf(w, " in %.2f ms\n", p.MS)
}

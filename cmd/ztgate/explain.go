package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

func (a *app) reloadCommand() *cobra.Command {
	return show(a, "reload", "Read the configuration again; flows that are still allowed go on",
		func(ctx context.Context, c *control.Client) (control.Reloaded, error) { return c.Reload(ctx) },
		func(w io.Writer, r control.Reloaded) {
			if len(r.Changed) == 0 && len(r.Restart) == 0 {
				fmt.Fprintln(w, "nothing has changed")
			}
			for _, k := range r.Changed {
				fmt.Fprintln(w, "in force now: "+k)
			}
			for _, k := range r.Restart {
				fmt.Fprintln(w, "needs a restart: "+k)
			}
		})
}

func (a *app) explainCommand() *cobra.Command {
	var q control.Question
	var network string
	cmd := &cobra.Command{
		Use: "explain SRC[:PORT] DST[:PORT]", Short: "Say what would happen to a packet, and why", Args: cobra.ExactArgs(2),
		Example: "  ztgate explain 172.31.0.10 10.0.0.10:443",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if q.Source, err = hostPort(args[0]); err != nil {
				return fault.Usage(err)
			}
			if q.Destination, err = hostPort(args[1]); err != nil {
				return fault.Usage(err)
			}
			if network != "" {
				if q.Network, err = ztnode.ParseNetworkID(network); err != nil {
					return fault.Usage(err)
				}
				q.FromOverlay = true
			}
			x, err := a.client().Explain(cmd.Context(), q)
			if err != nil {
				return err
			}
			return a.print(x, func(w io.Writer) { explanation(w, x) })
		},
	}
	protocolFlag(cmd.Flags(), &q.Protocol, "proto", "protocol of the packet: tcp, udp, icmp or a number (default: tcp with a port, else icmp)")
	networkFlag(cmd.Flags(), &network, "network", "network that the packet comes from, instead of the VPC")
	return cmd
}

// hostPort reads ADDRESS or ADDRESS:PORT.
func hostPort(s string) (netip.AddrPort, error) {
	if ap, err := netip.ParseAddrPort(s); err == nil {
		if ap.Port() == 0 {
			return ap, fmt.Errorf("%q: give a port from 1 to 65535, or none", s)
		}
		return ap, nil
	}
	addr, err := netip.ParseAddr(strings.Trim(s, "[]"))
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q: give ADDRESS or ADDRESS:PORT", s)
	}
	return netip.AddrPortFrom(addr, 0), nil
}

func explanation(w io.Writer, x control.Explanation) {
	text := func(ap netip.AddrPort) string {
		if ap.Port() == 0 {
			return ap.Addr().String()
		}
		return ap.String()
	}
	row(w, "packet", fmt.Sprintf("%s %s to %s", x.Question.Protocol, text(x.Question.Source), text(x.Question.Destination)))
	verdict := x.Verdict
	if x.Reason != "" {
		verdict += ", reason " + x.Reason
	}
	if x.Established {
		verdict += ", as part of a flow"
	}
	row(w, "verdict", verdict)
	if x.Detail != "" {
		row(w, "because", x.Detail)
	}
	if x.RuleText != "" {
		row(w, "policy", x.RuleText)
	}
	if x.Verdict != "forward" {
		return
	}
	source := text(x.Source)
	if x.Translation == "host" {
		source = "an address of this host"
	}
	row(w, "source", source+" ("+x.Translation+")")
	if x.Redirected {
		row(w, "destination", text(x.Destination))
	}
	for _, by := range x.By {
		row(w, "by", by)
	}
	if x.Network == 0 || !x.NextHop.IsValid() {
		row(w, "leaves", "to the VPC side")
		return
	}
	row(w, "route", fmt.Sprintf("%s in %s, next hop %s, MTU %d", x.Route, x.Network, x.NextHop, x.MTU))
	if x.Member == "" {
		row(w, "member", "not resolved yet")
	} else {
		path := x.Path
		if x.PathMTU != 0 {
			path += fmt.Sprintf(", in datagrams of up to %d bytes", x.PathMTU)
		}
		row(w, "member", x.Member+" "+path)
	}
}

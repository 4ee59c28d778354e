package main

import (
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/gateway"
	"ztgate/zerotier/ztnode"
)

func (a *app) doctorCommand() *cobra.Command {
	var from string
	var client netip.Addr
	cmd := &cobra.Command{
		Use:   "doctor [HOST[:PORT]...]",
		Short: "Walk the whole way to the targets and name the first broken link",
		Long: `Walk the whole way to the targets, from the host's settings on, and name the first
broken link with the remedy. Without arguments the targets are those of the
configuration. Without a running gateway it looks at all that one needs.

Exit codes: 0 all links hold, 3 only the gateway isn't running, 4 a link is broken.`,
		Example: "  ztgate doctor 10.0.0.10:443 --from 172.31.0.10",
		RunE: func(cmd *cobra.Command, args []string) error {
			if from != "" {
				a, err := netip.ParseAddr(from)
				if err != nil || a.Zone() != "" {
					return fault.Usagef("--from %q: give an address of a host in the VPC", from)
				}
				client = a.Unmap()
			}
			req, err := diagnosisRequest(args, client)
			if err != nil {
				return err
			}
			d, err := a.client().Doctor(cmd.Context(), req)
			if fault.KindOf(err) == fault.KindNotRunning {
				d, err = gateway.Examine(a.sources()), nil
			}
			if err != nil {
				return err
			}
			if err := a.print(d, func(w io.Writer) { diagnosis(w, d) }); err != nil {
				return err
			}
			return d.Err()
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "address of the client whose way it is (default: a neighbour in vpc.sources)")
	a.settingFlags(cmd.Flags(), "config")
	return cmd
}

func diagnosisRequest(args []string, client netip.Addr) (control.DiagnosisRequest, error) {
	req := control.DiagnosisRequest{Client: client}
	for _, arg := range args {
		if !strings.Contains(arg, "://") {
			ping, err := control.ParsePingTarget(arg)
			if err != nil {
				return req, err
			}
			host := ping.Host
			if strings.Contains(host, ":") {
				host = "[" + host + "]"
			}
			arg = "icmp://" + host
			if ping.Port != 0 {
				arg = fmt.Sprintf("tcp://%s:%d", host, ping.Port)
			}
		}
		req.Targets = append(req.Targets, arg)
	}
	return req, nil
}

func diagnosis(w io.Writer, d control.Diagnosis) {
	target := ""
	for _, l := range d.Links {
		if l.Target != target {
			target = l.Target
			fmt.Fprintln(w, "to "+ztnode.Printable(target))
		}
		detail := l.Detail
		if l.Remedy != "" {
			detail += ": " + l.Remedy
		}
		row(w, strings.ReplaceAll(string(l.State), "_", " "), l.Name, detail)
	}
}

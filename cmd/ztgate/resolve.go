package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"ztgate/router/control"
	"ztgate/zerotier/ztnode"
)

// dnsTable shows the name server for clients.
func dnsTable(w io.Writer, d *control.DNS) {
	for _, l := range d.Listen {
		if l.Error == "" {
			fmt.Fprintf(w, "names: answering at %s\n", l.Address)
		} else {
			fmt.Fprintf(w, "names: not answering at %s: %s\n", l.Address, l.Error)
		}
	}
	fmt.Fprintf(w, "names: %d hosts in the zone %s, %d questions are with other servers\n", d.Hosts, d.Zone, d.Forwarded)
	for _, text := range d.Unused {
		fmt.Fprintf(w, "names: %s\n", ztnode.Printable(text))
	}
	if len(d.Domains) == 0 {
		return
	}
	row(w, "DOMAIN", "SERVERS", "NETWORK", "LAST ANSWER", "ERROR")
	for _, x := range d.Domains {
		domain := x.Domain
		if domain == "" {
			domain = "all others"
		}
		row(w, domain, join(x.Servers), x.Network, ago(x.LastAnswer), x.Error)
	}
}

func (a *app) resolveCommand() *cobra.Command {
	return &cobra.Command{Use: "resolve NAME|ADDRESS [TYPE]", Short: "Show what a client would be told of a name, and by whom", Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := control.ResolveRequest{Name: args[0]}
			if len(args) > 1 {
				req.Type = args[1]
			}
			r, err := a.client().Resolve(cmd.Context(), req)
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) {
				fmt.Fprintf(w, "%s %s: %s, from %s", ztnode.Printable(r.Name), r.Type, r.Code, r.From)
				if len(r.Servers) > 0 {
					fmt.Fprintf(w, " (%s)", join(r.Servers))
				}
				fmt.Fprintln(w)
				for _, x := range r.Records {
					row(w, x.Name, x.TTL, x.Type, x.Value)
				}
				if r.Off {
					fmt.Fprintln(w, "clients' questions are not answered: dns.listen is empty")
				}
			})
		}}
}

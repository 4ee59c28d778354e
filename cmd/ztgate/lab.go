package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/lab"
)

// addLab adds the commands of the scenario on one machine.
func (a *app) addLab(root *cobra.Command) {
	opts := lab.Options{Prefix: lab.DefaultPrefix}
	var down bool
	var parts, nodes []string
	cmd := &cobra.Command{
		Use: "lab", Short: "Run the whole scenario on this machine and print what happened", Args: cobra.NoArgs,
		Long: `Run the whole scenario on this machine, in network namespaces: a planet with its
root and controller, an office host with a web server, the gateway, and a client in
a VPC. Needs root.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if down {
				return a.labDown(opts.Prefix)
			}
			if !a.json {
				opts.Progress = a.errOut
			}
			if err := labNodes(&opts, nodes); err != nil {
				return err
			}
			if err := labParts(&opts, parts); err != nil {
				return err
			}
			r, err := lab.Run(cmd.Context(), opts)
			if errors.Is(err, lab.ErrHost) {
				return fault.Usage(err)
			}
			if !a.json {
				r.WriteText(a.out)
				return err
			}
			return errors.Join(a.print(labReport{control.Schema, r}, nil), err)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&opts.Keep, "keep", false, "leave everything up afterwards")
	f.BoolVar(&down, "down", false, "remove what --keep or a killed lab left")
	durationFlag(f, &opts.Duration, "duration", "", 3*time.Second, 100*time.Millisecond, time.Hour, "length of each bulk transfer")
	durationFlag(f, &opts.Timeout, "timeout", "", time.Minute, time.Second, time.Hour, "how long everything may take to become ready")
	countFlag(f, &opts.Streams, "streams", "", 1, 1, 128, "connections of a bulk transfer")
	wordFlag(f, &opts.LogLevel, "log-level", "info", []string{"debug", "info", "warn", "error"}, "what the processes log: debug, info, warn, error")
	f.StringVar(&opts.ZeroTierOne, "zerotier-one", "", "path of a zerotier-one that plays the parts named by --real")
	f.StringSliceVar(&parts, "real", nil, "parts that zerotier-one plays: root, office, gateway (with nftables)")
	f.StringSliceVar(&nodes, "node", nil, "implementation of the nodes of office and gateway: go or libzt; office=libzt sets only that of the office")
	cmd.PersistentFlags().StringVar(&opts.Prefix, "prefix", lab.DefaultPrefix, "beginning of the names of namespaces and files")
	cmd.AddCommand(&cobra.Command{Use: "down", Short: "Remove what --keep or a killed lab left", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return a.labDown(opts.Prefix) }})
	var address string
	office := &cobra.Command{Use: "office", Short: "Serve the office's web pages", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			addr, err := netip.ParseAddr(address)
			if err != nil {
				return fault.Usage(fmt.Errorf("--address %q: give an IP address", address))
			}
			return stopped(lab.ServeOffice(cmd.Context(), addr))
		}}
	office.Flags().StringVar(&address, "address", "", "to listen on")
	cmd.AddCommand(office)
	root.AddCommand(cmd)
}

// labNodes says which implementations of our own node play. The root is the controller too,
// which only the node in Go can be.
func labNodes(o *lab.Options, nodes []string) error {
	if nodes == nil {
		nodes = []string{config.DefaultNode()}
	}
	for _, v := range nodes {
		part, name, one := strings.Cut(v, "=")
		if !one {
			name = v
		}
		if !slices.Contains(config.NodeImplementations(), name) {
			return fault.Usage(fmt.Errorf("--node %q: this program has %s", v, join(config.NodeImplementations())))
		}
		m := lab.Ours
		if name == config.NodeLibzt {
			m = lab.Libzt
		}
		switch {
		case !one:
			o.Office, o.Gateway = m, m
		case part == "office":
			o.Office = m
		case part == "gateway":
			o.Gateway = m
		default:
			return fault.Usage(fmt.Errorf("--node %q: give office or gateway: the root is the controller and always the node in Go", v))
		}
	}
	return nil
}

// labParts says which parts of the scenario are not ours.
func labParts(o *lab.Options, parts []string) error {
	programs := map[string]*lab.Program{"root": &o.Root, "office": &o.Office, "gateway": &o.Gateway}
	for _, p := range parts {
		m := programs[p]
		if m == nil {
			return fault.Usage(fmt.Errorf("--real %q: give root, office or gateway", p))
		}
		*m = lab.Reference
	}
	if len(parts) > 0 && o.ZeroTierOne == "" {
		return fault.Usage(errors.New("--real needs --zerotier-one with the program's path"))
	}
	return nil
}

func (a *app) labDown(prefix string) error {
	err := lab.Down(prefix)
	if errors.Is(err, lab.ErrHost) && os.Geteuid() != 0 {
		return fault.Usage(err)
	}
	return err
}

type labReport struct {
	Schema int `json:"schema"`
	*lab.Report
}

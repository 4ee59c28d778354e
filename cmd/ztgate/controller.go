package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ztgate/router/admin"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

func (a *app) controllerCommand() *cobra.Command {
	network := group("network", "Networks of the controller", a.netCreate(), a.netSet(), a.netList(), a.netShow(), a.netDelete())
	member := group("member", "Members of a network", a.memberList("list NWID"), a.memberSet("authorize NWID ADDRESS...", true),
		a.memberSet("deauthorize NWID ADDRESS...", false), a.memberDelete())
	return group("controller", "Run your own networks, on a node started with --controller",
		a.netCreate(), a.netSet(), a.netList(), a.netShow(), a.netDelete(), a.memberList("members NWID"),
		a.memberSet("authorize NWID ADDRESS...", true), a.memberSet("deauthorize NWID ADDRESS...", false), network, member,
		a.controllerImport(), a.controllerExport())
}

func specFlags(cmd *cobra.Command) *admin.NetworkSpec {
	s := &admin.NetworkSpec{}
	f := cmd.Flags()
	f.StringVar(&s.Name, "name", "", "name of the network")
	f.BoolVar(&s.Public, "public", false, "let everybody in without authorisation")
	f.StringVar(&s.Subnet, "subnet", "", "subnet that members get addresses of, as in 10.147.17.0/24")
	f.StringArrayVar(&s.Pools, "pool", nil, "FIRST-LAST, addresses to give to members; repeatable")
	f.StringArrayVar(&s.Routes, "route", nil, "TARGET or TARGET=VIA, managed route; repeatable")
	countFlag(f, &s.MTU, "mtu", "", 0, admin.MinNetworkMTU, admin.MaxNetworkMTU, "MTU of the network, in bytes (default 2800)")
	f.BoolVar(&s.RFC4193, "rfc4193", false, "give members an RFC 4193 IPv6 address")
	f.BoolVar(&s.SixPlan, "6plane", false, "give members a 6PLANE IPv6 prefix")
	f.StringVar(&s.Rules, "rules", "", "file with rules in ZeroTier's rule language")
	f.StringVar(&s.JSON, "json-keys", "", "JSON object with further keys of the network record")
	return s
}

// patch returns what the flags say.
func patch(cmd *cobra.Command, s *admin.NetworkSpec) (json.RawMessage, error) {
	f := cmd.Flags()
	s.Private = f.Changed("public") && !s.Public
	for _, name := range []string{"rfc4193", "6plane"} {
		if f.Changed(name) && f.Lookup(name).Value.String() == "false" {
			return nil, fault.Usagef("--%s=false: leave it out; to take such addresses back, give --json-keys '{\"v6AssignMode\":{}}'", name)
		}
	}
	return s.Patch()
}

func (a *app) netCreate() *cobra.Command {
	cmd := &cobra.Command{Use: "create", Short: "Make a network", Args: cobra.NoArgs,
		Example: "  ztgate controller create --name office --subnet 10.147.17.0/24"}
	spec := specFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		change, err := patch(cmd, spec)
		if err != nil {
			return err
		}
		r, err := a.client().CreateNetwork(cmd.Context(), change)
		if err != nil {
			return err
		}
		return a.print(r, func(w io.Writer) { fmt.Fprintln(w, field(r.Record, "id")) })
	}
	return cmd
}

func (a *app) netSet() *cobra.Command {
	cmd := &cobra.Command{Use: "set NWID", Short: "Change a network", Args: cobra.ExactArgs(1)}
	spec := specFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		changes := false
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) { changes = changes || f.Changed })
		if !changes {
			return fault.Usagef("%s: nothing to change: give one of its flags, see ztgate help controller set", cmd.CommandPath())
		}
		change, err := patch(cmd, spec)
		if err != nil {
			return err
		}
		r, err := a.client().SetNetwork(cmd.Context(), args[0], change)
		if err != nil {
			return err
		}
		return a.printRecord(r)
	}
	return cmd
}

func (a *app) netList() *cobra.Command {
	return show(a, "list", "List the networks of the controller",
		func(ctx context.Context, c *control.Client) (control.Records, error) {
			return c.ControllerNetworks(ctx)
		},
		func(w io.Writer, r control.Records) {
			row(w, "NETWORK", "NAME", "PRIVATE", "MTU", "ROUTES", "REVISION")
			for _, n := range r.Records {
				row(w, field(n, "id"), field(n, "name"), field(n, "private"), field(n, "mtu"), routeList(n), field(n, "revision"))
			}
		})
}

func (a *app) netShow() *cobra.Command {
	return &cobra.Command{Use: "show NWID", Short: "Print the record of a network", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := a.client().ControllerNetwork(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.printRecord(r)
		}}
}

func (a *app) netDelete() *cobra.Command {
	return &cobra.Command{Use: "delete NWID", Short: "Delete a network and its members", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := a.client().DeleteNetwork(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) { fmt.Fprintf(w, "deleted %s\n", args[0]) })
		}}
}

func (a *app) memberList(use string) *cobra.Command {
	return &cobra.Command{Use: use, Short: "List the members of a network", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := a.client().Members(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) {
				row(w, "MEMBER", "NAME", "AUTHORIZED", "ONLINE", "ADDRESSES", "ENDPOINT", "REVISION")
				for _, m := range r.Records {
					st := r.States[field(m, "id")]
					row(w, field(m, "id"), field(m, "name"), field(m, "authorized"), st.Online, field(m, "ipAssignments"), st.Endpoint, field(m, "revision"))
				}
			})
		}}
}

func (a *app) memberSet(use string, authorized bool) *cobra.Command {
	short, alias, done := "Let nodes into a network; they need not have asked yet", "authorise", "authorized"
	if !authorized {
		short, alias, done = "Remove nodes from a network", "deauthorise", "deauthorized"
	}
	spec := admin.MemberSpec{Authorized: &authorized}
	var bridge, wait bool
	var timeout time.Duration
	cmd := &cobra.Command{Use: use, Short: short, Aliases: []string{alias}, Args: cobra.MinimumNArgs(2)}
	if authorized {
		cmd.Example = "  ztgate controller authorize 7df23418e82ebcd3 cc6ffd2c5c --wait --timeout 2m"
		cmd.Flags().BoolVar(&wait, "wait", false, "wait until they have asked for the network and are online; exit code 4 if they aren't in time")
		durationFlag(cmd.Flags(), &timeout, "timeout", "", time.Minute, time.Millisecond, 7*24*time.Hour, "how long to wait at most")
		cmd.Flags().StringVar(&spec.Name, "name", "", "name of the member")
		cmd.Flags().StringArrayVar(&spec.IPs, "ip", nil, "address for the member, repeatable")
		cmd.Flags().BoolVar(&bridge, "bridge", false, "let the member bridge other hosts into the network")
		cmd.Flags().StringArrayVar(&spec.Tags, "tag", nil, "ID=VALUE, tag of the member, repeatable; replaces those it has")
		cmd.Flags().UintSliceVar(&spec.Caps, "capability", nil, "number of a capability of the network, repeatable; replaces those it has")
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		for _, name := range []string{"ip", "name"} {
			if len(args) > 2 && cmd.Flags().Changed(name) {
				return fault.Usagef("--%s is for one member: name one address, not %d", name, len(args)-1)
			}
		}
		if cmd.Flags().Changed("bridge") {
			spec.Bridge = &bridge
		}
		patch, err := spec.Patch()
		if err != nil {
			return err
		}
		if !wait && cmd.Flags().Changed("timeout") {
			return fault.Usagef("--timeout is for --wait: give both or none")
		}
		for _, address := range args[1:] {
			r, err := a.client().SetMember(cmd.Context(), args[0], address, patch)
			if err != nil {
				return err
			}
			if wait && a.json {
				continue // the answer comes when they are online
			}
			if err := a.print(r, func(w io.Writer) { fmt.Fprintf(w, "%s %s\n", done, address) }); err != nil {
				return err
			}
		}
		if !wait {
			return nil
		}
		return a.waitMembers(cmd.Context(), args[0], args[1:], timeout)
	}
	return cmd
}

// waitMembers waits until all members are online, and names all that aren't in time.
func (a *app) waitMembers(ctx context.Context, network string, members []string, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var errs []error
	for _, address := range members {
		r, err := a.client().WaitMember(ctx, network, address)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if err := a.print(r, func(w io.Writer) { fmt.Fprintf(w, "online %s\n", address) }); err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}

func (a *app) memberDelete() *cobra.Command {
	return &cobra.Command{Use: "delete NWID ADDRESS", Short: "Forget a member", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := a.client().DeleteMember(cmd.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) { fmt.Fprintf(w, "deleted %s\n", args[1]) })
		}}
}

func (a *app) controllerImport() *cobra.Command {
	return &cobra.Command{Use: "import DIR", Short: "Take over the networks of a controller of zerotier-one that is stopped", Args: cobra.ExactArgs(1),
		Long: `Take over the networks of a controller of zerotier-one that is stopped.

DIR is its home or its controller.d. The identity comes along, since networks
belong to it. No process may use our home meanwhile, and it has no networks
yet. All is taken or nothing; what has no counterpart is named.`,
		Example: "  ztgate controller import /var/lib/zerotier-one --home /var/lib/ztgate-controller",
		RunE: func(_ *cobra.Command, args []string) error {
			_, home, _ := config.Location(a.sources())
			m, err := admin.ImportController(args[0], home)
			if err != nil {
				return err
			}
			return a.printMigration("imported", m)
		}}
}

func (a *app) controllerExport() *cobra.Command {
	return &cobra.Command{Use: "export DIR", Short: "Write the controller's networks as a home of zerotier-one", Args: cobra.ExactArgs(1),
		Example: "  ztgate controller export /root/zerotier-one --home /var/lib/ztgate-controller",
		RunE: func(_ *cobra.Command, args []string) error {
			_, home, _ := config.Location(a.sources())
			m, err := admin.ExportController(home, args[0])
			if err != nil {
				return err
			}
			return a.printMigration("exported", m)
		}}
}

func (a *app) printMigration(done string, m admin.Migration) error {
	return a.print(m, func(w io.Writer) {
		fmt.Fprintf(w, "%s %d networks and %d members of controller %s to %s, identity %s\n", done, m.Networks, m.Members, m.Address, m.To, m.Identity)
		for _, n := range m.Notes {
			fmt.Fprintln(w, "note: "+ztnode.Printable(n))
		}
	})
}

// printRecord prints a record as it is: people who ask for it want all keys.
func (a *app) printRecord(r control.Record) error {
	var b bytes.Buffer
	if err := json.Indent(&b, r.Record, "", " "); err != nil {
		return fmt.Errorf("print record: %w", err)
	}
	return a.print(r, func(w io.Writer) { fmt.Fprintln(w, b.String()) })
}

// field returns one key of a record for a table.
func field(record json.RawMessage, key string) string {
	var m map[string]any
	if json.Unmarshal(record, &m) != nil || m[key] == nil {
		return ""
	}
	if list, ok := m[key].([]any); ok {
		return join(list)
	}
	return fmt.Sprint(m[key])
}

func routeList(record json.RawMessage) string {
	var n struct {
		Routes []struct{ Target, Via string } `json:"routes"`
	}
	if json.Unmarshal(record, &n) != nil {
		return ""
	}
	var out []string
	for _, r := range n.Routes {
		if r.Via != "" {
			r.Target += " via " + r.Via
		}
		out = append(out, r.Target)
	}
	return join(out)
}

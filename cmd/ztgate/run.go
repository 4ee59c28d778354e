package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/gateway"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

func (a *app) runCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the gateway in the foreground",
		Long: `Run the gateway in the foreground.

Flags win over environment variables (ZTGATE_ and the flag's name), these over
the configuration file, and this over the defaults. SIGTERM or SIGINT stops it,
a second one at once.`,
		Example: "  ztgate run --network 8056c2e21c000001 --source 172.31.0.0/16 --allow tcp:10.0.0.10:443 --target tcp://10.0.0.10:443",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(a.sources())
			if err != nil {
				return err
			}
			return stopped(a.runGateway(cmd.Context(), cfg, config.NewLogger(a.errOut, cfg)))
		},
	}
	a.settingFlags(cmd.Flags())
	return cmd
}

func (a *app) memberCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "member",
		Short: "Join this machine to networks",
		Long: `Join this machine to networks, one interface each, as zerotier-one does.

With --controller and no network it is a plain root or controller that needs no
interface and no privileges.`,
		Example: "  ztgate member --network 8056c2e21c000001 --home /var/lib/ztgate-member",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			src := a.sources()
			src.NoFile = true // the file is the gateway's
			src.Defaults = map[string]string{"vpc.tun": gateway.MemberTUN}
			cfg, err := config.Load(src)
			if err != nil {
				return err
			}
			return stopped(a.runMember(cmd.Context(), cfg, config.NewLogger(a.errOut, cfg)))
		},
	}
	a.settingFlags(cmd.Flags(), "port", "network", "tun", "node", "planet", "controller", "api-listen", "listen", "log-level", "log-format", "target", "config")
	cmd.Flags().Lookup("tun").Usage = "name of the first interface"
	cmd.Flags().Lookup("tun").DefValue = gateway.MemberTUN
	return cmd
}

// stopped turns the end on request into success.
func stopped(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (a *app) waitCommand() *cobra.Command {
	var what string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "wait", Short: "Wait until the gateway is online or ready", Args: cobra.NoArgs,
		Example: "  ztgate wait --for ready --timeout 60s",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			h, err := a.client().Wait(ctx, what)
			if err != nil {
				return err
			}
			return a.print(h, func(w io.Writer) { fmt.Fprintln(w, what) })
		},
	}
	wordFlag(cmd.Flags(), &what, "for", "ready", []string{"online", "ready"}, "what to wait for: online or ready")
	durationFlag(cmd.Flags(), &timeout, "timeout", "", time.Minute, time.Millisecond, 7*24*time.Hour, "how long to wait at most")
	return cmd
}

func (a *app) healthCommand() *cobra.Command {
	return &cobra.Command{
		Use: "health", Short: "Check health: exit code 0 if ready or degraded, 4 if down", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := a.client().Health(cmd.Context())
			if err != nil {
				return err
			}
			if err := a.print(h, func(w io.Writer) {
				row(w, "CHECK", "STATE", "REASON", "REMEDY")
				for _, c := range h.Checks {
					row(w, c.Name, c.Word(), c.Reason, c.Remedy)
				}
			}); err != nil {
				return err
			}
			return h.Err()
		},
	}
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Print the version", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error {
		b := control.BuildInfo()
		return a.print(b, func(w io.Writer) {
			fmt.Fprintf(w, "ztgate %s (%s, %s, %s, node %s of %s)\n", b.Version, b.Revision, b.GoVersion, b.Platform, b.Node, join(b.Nodes))
		})
	}}
}

func (a *app) configCommand() *cobra.Command {
	load := func(cmd *cobra.Command, f func(*config.Config) error) {
		cmd.Args = cobra.MaximumNArgs(1)
		cmd.RunE = func(_ *cobra.Command, args []string) error {
			if len(args) == 1 {
				if a.flags["config"] != nil {
					return fault.Usagef("config: given twice, as FILE and by --config: leave one out")
				}
				a.flags["config"] = args
			}
			cfg, err := config.Load(a.sources())
			if err != nil {
				return err
			}
			return f(cfg)
		}
		a.settingFlags(cmd.Flags())
	}
	check := &cobra.Command{Use: "check [FILE]", Short: "Check the configuration; needs no privileges"}
	var member bool
	check.Flags().BoolVar(&member, "member", false, "the configuration is that of ztgate member")
	load(check, func(cfg *config.Config) error {
		role, judge := plan.Gateway, plan.Check
		if member {
			role, judge = plan.Member, plan.CheckMember
		}
		if err := judge(cfg); err != nil {
			return err
		}
		v := control.Configuration{Schema: control.Schema, Values: cfg.Values(), Warnings: slices.Clone(cfg.Warnings)}
		for _, p := range plan.Make(plan.Input{Role: role, Config: cfg}).Problems {
			v.Warnings = append(v.Warnings, p.String())
		}
		return a.print(v, func(w io.Writer) {
			for _, warning := range v.Warnings {
				fmt.Fprintln(w, "warning: "+ztnode.Printable(warning))
			}
			fmt.Fprintln(w, "the configuration is valid")
		})
	})
	showCmd := &cobra.Command{Use: "show [FILE]", Short: "Print the effective configuration and where each value came from"}
	load(showCmd, func(cfg *config.Config) error {
		v := control.Configuration{Schema: control.Schema, Values: cfg.Values(), Warnings: cfg.Warnings}
		return a.print(v, func(w io.Writer) {
			row(w, "KEY", "VALUE", "ORIGIN")
			for _, value := range v.Values {
				row(w, value.Key, plain(value.Value), value.Origin)
			}
		})
	})
	return group("config", "Check and show the configuration", check, showCmd)
}

func plain(v any) any {
	if list, ok := v.([]string); ok {
		return join(list)
	}
	return v
}

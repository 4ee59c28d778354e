package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"ztgate/router/control"
)

func moonTable(w io.Writer, m control.Moons) {
	row(w, "MOON", "STATE", "ROOTS")
	for _, moon := range m.Moons {
		state := "in use"
		if moon.Waiting {
			state = "waiting for " + moon.Seed
		}
		roots := make([]string, len(moon.Roots))
		for i, r := range moon.Roots {
			roots[i] = r.Address
		}
		row(w, moon.ID, state, join(roots))
	}
}

func (a *app) moonsCommand() *cobra.Command {
	cmd := show(a, "moons", "List the moons in use: roots besides those of the planet",
		func(ctx context.Context, c *control.Client) (control.Moons, error) { return c.Moons(ctx) }, moonTable)
	cmd.Aliases = []string{"listmoons"}
	return cmd
}

func (a *app) orbitCommand() *cobra.Command {
	return &cobra.Command{Use: "orbit MOON [SEED]", Short: "Use a moon; SEED is one of its roots, by default the one it is named after",
		Args: cobra.RangeArgs(1, 2), RunE: func(cmd *cobra.Command, args []string) error {
			seed := ""
			if len(args) == 2 {
				seed = args[1]
			}
			m, err := a.client().Orbit(cmd.Context(), args[0], seed)
			if err != nil {
				return err
			}
			return a.print(m, func(w io.Writer) { moonTable(w, m) })
		}}
}

func (a *app) deorbitCommand() *cobra.Command {
	return &cobra.Command{Use: "deorbit MOON", Short: "Stop using a moon", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			m, err := a.client().Deorbit(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.print(m, func(w io.Writer) { fmt.Fprintln(w, "left "+args[0]) })
		}}
}

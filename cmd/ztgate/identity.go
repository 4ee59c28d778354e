package main

import (
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"ztgate/router/admin"
	"ztgate/router/fault"
)

func (a *app) identityCommand() *cobra.Command {
	var force bool
	create := &cobra.Command{
		Use: "new [SECRET-FILE [PUBLIC-FILE]]", Short: "Make an identity; without a file, print it with its secret",
		Args: cobra.MaximumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			switch {
			case force && len(args) == 0:
				return fault.Usagef("--force is for files: name one, or leave it out")
			case len(args) == 2 && filepath.Clean(args[0]) == filepath.Clean(args[1]):
				return fault.Usagef("%s: secret and public identity need a file each", args[0])
			}
			args = append(args, "", "")
			id, err := admin.NewIdentity(args[0], args[1], force)
			if err != nil {
				return err
			}
			return a.print(id, func(w io.Writer) {
				if id.SecretText != "" {
					fmt.Fprintln(w, id.SecretText)
					return
				}
				fmt.Fprintf(w, "identity %s written to %s\n", id.Address, id.File)
			})
		},
	}
	create.Flags().BoolVar(&force, "force", false, "replace files that exist")
	showCmd := &cobra.Command{
		Use: "show FILE", Short: "Print the public identity in a file (- is standard input)", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			id, _, err := admin.ReadIdentity(args[0], a.in)
			if err != nil {
				return err
			}
			return a.print(id, func(w io.Writer) { fmt.Fprintln(w, id.Public) })
		},
	}
	validate := &cobra.Command{
		Use: "validate FILE", Short: "Check that address and keys of an identity belong together", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			id, err := admin.CheckIdentity(args[0], a.in)
			if err != nil {
				return err
			}
			return a.print(id, func(w io.Writer) { fmt.Fprintf(w, "identity %s is valid\n", id.Address) })
		},
	}
	return group("identity", "Make, show and check identities", create, showCmd, validate)
}

func (a *app) planetCommand() *cobra.Command {
	spec := admin.PlanetSpec{}
	var out, key string
	var force bool
	create := &cobra.Command{
		Use: "make", Short: "Make and sign the planet file of your own roots", Args: cobra.NoArgs,
		Long: `Make and sign the planet file of your own roots.

The key file is made by the first call. A later call with the same key makes the
next revision, which running nodes accept from their roots.`,
		Example: "  ztgate planet make --root identity.public=198.51.100.1/9993 --out planet --key planet.key",
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case filepath.Clean(out) == filepath.Clean(key):
				return fault.Usagef("%s: planet and key need a file each", out)
			case cmd.Flags().Changed("id") && spec.ID == 0:
				return fault.Usagef("--id 0: give a number above 0, or leave it out for that of the key")
			}
			spec.Now = time.Now()
			p, err := admin.WritePlanet(spec, out, key, force)
			if err != nil {
				return err
			}
			return a.print(p, func(w io.Writer) {
				fmt.Fprintf(w, "planet %d with %d roots written to %s; keep %s: only it can sign a later revision\n", p.ID, len(p.Roots), out, key)
			})
		},
	}
	f := create.Flags()
	f.StringArrayVar(&spec.Roots, "root", nil, "IDENTITY=ADDRESS/PORT[,ADDRESS/PORT]; IDENTITY is a public identity or a file with one; repeatable")
	f.Uint64Var(&spec.ID, "id", 0, "ID of the planet (default: the key's)")
	f.StringVarP(&out, "out", "o", "planet", "file to write")
	f.StringVar(&key, "key", "planet.key", "file with the signing key")
	f.BoolVar(&force, "force", false, "replace the file even if it holds another planet")
	showCmd := &cobra.Command{
		Use: "show FILE", Short: "Print a planet file (- is standard input)", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := admin.ReadPlanet(args[0], a.in)
			if err != nil {
				return err
			}
			return a.print(p, func(w io.Writer) {
				fmt.Fprintf(w, "%s %d of %s\n", p.Type, p.ID, time.UnixMilli(p.Timestamp).UTC().Format(time.RFC3339))
				row(w, "ROOT", "ENDPOINTS")
				for _, r := range p.Roots {
					row(w, r.Address, join(r.Endpoints))
				}
			})
		},
	}
	return group("planet", "Make and show planet files", create, showCmd)
}

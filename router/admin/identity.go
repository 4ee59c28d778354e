// Package admin is what works without a running process: identities, planets and
// records of networks.
package admin

import (
	"errors"
	"fmt"
	"io"
	"os"

	"ztgate/internal/atomicfile"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/identity"
)

// Identity is an identity in a form for people.
type Identity struct {
	Schema  int    `json:"schema"`
	Address string `json:"address"`
	Public  string `json:"publicIdentity"`
	Secret  bool   `json:"hasSecret"`
	File    string `json:"file,omitempty"`
	// SecretText is only filled if the secret was not written to a file.
	SecretText string `json:"secretIdentity,omitempty"`
}

func viewIdentity(id *identity.Identity) Identity {
	return Identity{Schema: control.Schema, Address: id.Address().String(), Public: id.String(), Secret: id.HasSecret()}
}

// NewIdentity generates an identity and writes it to files; an empty path writes
// none. Files that exist are only replaced with force.
func NewIdentity(secretPath, publicPath string, force bool) (Identity, error) {
	for _, path := range []string{secretPath, publicPath} {
		if err := mayWrite(path, force); err != nil {
			return Identity{}, err
		}
	}
	id, err := identity.Generate(nil)
	if err != nil {
		return Identity{}, err
	}
	v := viewIdentity(id)
	if secretPath == "" {
		v.SecretText = id.SecretString()
		return v, nil
	}
	v.File = secretPath
	if err := atomicfile.Write(secretPath, []byte(id.SecretString()), 0o600); err != nil {
		return v, err
	}
	if publicPath == "" {
		return v, nil
	}
	return v, atomicfile.Write(publicPath, []byte(id.String()), 0o644)
}

func mayWrite(path string, force bool) error {
	if path == "" || force {
		return nil
	}
	_, err := os.Lstat(path)
	switch {
	case err == nil:
		return fault.Usagef("%s exists: choose another file, or replace it with --force", path)
	case errors.Is(err, os.ErrNotExist):
		return nil
	}
	return err
}

// ReadIdentity reads an identity from a file, or from in if path is "-".
func ReadIdentity(path string, in io.Reader) (Identity, *identity.Identity, error) {
	b, err := readInput(path, in)
	if err != nil {
		return Identity{}, nil, err
	}
	id, err := identity.Parse(string(b))
	if err != nil {
		return Identity{}, nil, fmt.Errorf("read identity from %s: %w", nameOf(path), err)
	}
	v := viewIdentity(id)
	if path != "-" {
		v.File = path
	}
	return v, id, nil
}

// CheckIdentity reads an identity and checks that its address and, if it is
// there, the secret key belong to the public key.
func CheckIdentity(path string, in io.Reader) (Identity, error) {
	v, id, err := ReadIdentity(path, in)
	if err != nil {
		return v, err
	}
	if err := id.Validate(); err != nil {
		return v, fmt.Errorf("identity %s from %s: %w", id.Address(), nameOf(path), err)
	}
	return v, nil
}

func nameOf(path string) string {
	if path == "-" {
		return "standard input"
	}
	return path
}

// maxInput bounds files that are given on the command line.
const maxInput = 1 << 20

func readInput(path string, in io.Reader) ([]byte, error) {
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fault.Usage(err)
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxInput+1))
	if err == nil && len(b) > maxInput {
		err = errors.New("is too long")
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", nameOf(path), err)
	}
	return b, nil
}

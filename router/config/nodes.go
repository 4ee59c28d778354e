package config

import (
	"fmt"
	"slices"
	"strings"
)

// Implementations of a node.
const (
	NodeGo    = "go"
	NodeLibzt = "libzt"
)

// DefaultNode is the implementation of the node unless configured: libzt where it
// is built in.
func DefaultNode() string {
	if libztBuilt {
		return NodeLibzt
	}
	return NodeGo
}

// NodeImplementations lists the implementations in this program.
func NodeImplementations() []string {
	if libztBuilt {
		return []string{NodeGo, NodeLibzt}
	}
	return []string{NodeGo}
}

// CheckNode refuses an implementation that this program doesn't have.
func CheckNode(name string) error {
	switch {
	case slices.Contains(NodeImplementations(), name):
		return nil
	case name == NodeLibzt:
		return fmt.Errorf("this program was built without libzt: use --node go, or a program from make build-libzt")
	}
	return fmt.Errorf("use one of %s", strings.Join(NodeImplementations(), ", "))
}

package router

import (
	"fmt"
	"slices"
	"strings"
)

// Makes of a node.
const (
	NodeGo    = "go"
	NodeLibzt = "libzt"
)

// nodeMakes are those of this build, by name.
var nodeMakes = map[string]func(NodeConfig) (Node, error){NodeGo: newGoNode}

// DefaultNode is the make of the node unless configured: libzt where it is built
// in.
func DefaultNode() string {
	if nodeMakes[NodeLibzt] != nil {
		return NodeLibzt
	}
	return NodeGo
}

// NodeMakes lists the makes of this build.
func NodeMakes() []string {
	var out []string
	for name := range nodeMakes {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// checkNode refuses a make that this build doesn't have.
func checkNode(name string) error {
	switch {
	case nodeMakes[name] != nil:
		return nil
	case name == NodeLibzt:
		return fmt.Errorf("this program was built without libzt: use --node go, or a program from make build-libzt")
	}
	return fmt.Errorf("use one of %s", strings.Join(NodeMakes(), ", "))
}

// newNode makes the node that is configured.
func newNode(cfg NodeConfig) (Node, error) {
	name := cfg.Make
	if name == "" {
		name = DefaultNode()
	}
	if err := checkNode(name); err != nil {
		return nil, usagef("node %q: %w", name, err)
	}
	return nodeMakes[name](cfg)
}

// DefaultParts returns the nodes of this build and the forwarding plane of this
// module.
func DefaultParts() Parts {
	return Parts{NewNode: newNode, NewPlane: newEngine}
}

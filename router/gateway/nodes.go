package gateway

import (
	"ztgate/router/config"
	"ztgate/router/fault"
)

// newNode makes the node that is configured.
func newNode(cfg NodeConfig) (Node, error) {
	name := cfg.Make
	if name == "" {
		name = config.DefaultNode()
	}
	if err := config.CheckNode(name); err != nil {
		return nil, fault.Usagef("node %q: %w", name, err)
	}
	if name == config.NodeLibzt {
		return newLibztNode(cfg)
	}
	return newGoNode(cfg)
}

// DefaultParts returns the nodes of this build and the forwarding plane of this
// module.
func DefaultParts() Parts {
	return Parts{NewNode: newNode, NewPlane: newEngine}
}

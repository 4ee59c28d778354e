package gateway

import (
	"ztgate/router/config"
	"ztgate/router/fault"
)

// newNode makes the node that is configured.
func newNode(cfg NodeConfig) (Node, error) {
	name := cfg.Implementation
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

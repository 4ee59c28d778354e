package router

// DefaultParts returns the node in pure Go and the forwarding plane of this
// module.
func DefaultParts() Parts {
	return Parts{NewNode: newGoNode, NewPlane: newEngine}
}

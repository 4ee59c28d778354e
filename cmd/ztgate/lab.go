package main

import "github.com/spf13/cobra"

// addLab adds the commands of the scenario on one machine.
func (a *app) addLab(*cobra.Command) {}

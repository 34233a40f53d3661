from accuquant.cli import main

main()
